"""`fleet completion`: what a shell needs to complete verbs, options, queues and jobs."""

from __future__ import annotations

import click

_HOW = """Print the completion script for a shell. To have it in every new shell:

\b
bash  echo 'eval "$(fleet completion bash)"' >> ~/.bashrc
zsh   echo 'eval "$(fleet completion zsh)"' >> ~/.zshrc    (after compinit)
fish  fleet completion fish > ~/.config/fish/completions/fleet.fish
"""


@click.command(help=_HOW)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """See _HOW."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell  # noqa: S101  # click has had all three since 8.0
    # not .source(), which looks for a bash to ask for its version
    script = kind(ctx.find_root().command, {}, "fleet", "_FLEET_COMPLETE")
    click.echo(script.source_template % script.source_vars())
