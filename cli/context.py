"""What every verb needs: the settings, a connection, and ways to print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import redis
    from rich.console import Console

    from broker.errors import FleetError
    from broker.settings import Settings
    from fleet.endpoint import Endpoint

SCHEMA = 1
#: seconds without an answer of Redis after which whoever looks is told
PATIENCE_SECONDS = 3.0


@dataclass
class Context:
    """The options that every verb takes, and what is built from them when first needed."""

    redis_url: str | None = None
    no_color: bool = False
    quiet: bool = False
    debug: bool = False
    #: None until the verb has read its options
    as_json: bool | None = None
    #: the Redis spoken to last, for messages
    redis_address: str = "?"

    @cached_property
    def settings(self) -> Settings:
        """The settings in force, flags included."""
        from broker import settings

        return settings.load({} if self.redis_url is None else {"redis_url": self.redis_url})

    def client(self, timeout_seconds: float, *, start: bool = False) -> redis.Redis:
        """As `redis`, not yet connected; a reply that takes longer has failed."""
        from fleet.late import import_redis

        import_redis()
        from broker.connection import address, connect

        client = connect(self.url(start=start), timeout_seconds=timeout_seconds)
        self.redis_address = address(client)
        return client

    def redis(self, *, start: bool = False) -> redis.Redis:
        """A connected client: `--redis`, FLEET_REDIS_URL, the files, or the embedded broker.

        `start` lets the embedded broker be started where nothing is configured (and says
        so). Raises RedisUnreachable or RedisDenied when it does not answer.
        """
        from fleet.late import import_redis

        import_redis()
        from broker.connection import REPLY_SECONDS, translated

        client = self.client(REPLY_SECONDS, start=start)
        with translated(self.redis_address), self._telling_of_delay(REPLY_SECONDS):
            client.ping()
        return client

    @contextmanager
    def _telling_of_delay(self, most_seconds: float) -> Iterator[None]:
        """Say so where Redis is silent for a while; a program that reads documents is not told."""
        import threading

        told = f"Redis at {self.redis_address} has not answered for {PATIENCE_SECONDS:g} s;"
        words = f"{told} waiting for {most_seconds:g} s at most."
        timer = threading.Timer(PATIENCE_SECONDS, self.say, [words])
        timer.daemon = True
        if not self.as_json:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def url(self, *, start: bool = False) -> str:
        """The URL of Redis, its password included. Never print it."""
        from broker.connection import password_from, with_password

        url = self._configured_url()
        if url is not None:
            return with_password(url, password_from(self.settings))
        from fleet.embedded import embedded_url

        return embedded_url(start=start, say=self.say)

    def endpoint(self, redis_host: str | None) -> Endpoint:
        """How scripts that run elsewhere find Redis, no secret in it; `redis_host`: its machine to them.

        Raises UsageError, RedisUnreachable.
        """
        from fleet import endpoint

        url = self._configured_url()
        if url is None:
            return endpoint.of_embedded(redis_host)
        return endpoint.configured(url, self.settings.redis_password_file, redis_host, self.say)

    def embedded_addresses(self) -> tuple[str, ...]:
        """The addresses that the embedded broker listens on; none where another Redis is configured."""
        if self._configured_url() is not None:
            return ()
        from fleet import embedded

        return embedded.embedded_addresses()

    def _configured_url(self) -> str | None:
        """What was said about Redis; None: nothing, so the embedded broker is meant."""
        # an empty --redis is a mistake in somebody's script, not a wish for the embedded broker
        return self.settings.redis_url or None if self.redis_url is None else self.redis_url

    @cached_property
    def console(self) -> Console:
        """stdout for people: colour only on a terminal, NO_COLOR honoured."""
        from rich.console import Console

        return Console(no_color=self.no_color or None, highlight=False, soft_wrap=not sys.stdout.isatty())

    @cached_property
    def messages(self) -> Console:
        """stderr for people: progress and messages; silent with --quiet."""
        from rich.console import Console

        return Console(stderr=True, no_color=self.no_color or None, highlight=False, quiet=self.quiet)

    def say(self, message: str) -> None:
        """One line of progress on stderr, unless --quiet."""
        if not self.quiet:
            click.echo(message, err=True)


pass_context = click.make_pass_decorator(Context)


def print_json(document: dict[str, Any]) -> None:
    """One document on stdout, in UTF-8, `"schema"` at its top; times as ISO-8601 UTC."""
    text = json.dumps({"schema": SCHEMA, **document}, default=_json_value, ensure_ascii=False)
    # an argument that is no UTF-8 is there as a lone surrogate, and JSON spells that \udcff
    click.echo(text.encode("utf-8", "backslashreplace"))


def json_value(value: Any) -> Any:
    """`value` if JSON has it, or its repr: a job may return anything."""
    try:
        json.dumps(value, default=_json_value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)
    return value


def error_fields(error: FleetError | None) -> dict[str, str] | None:
    """An error as a field of a document."""
    return {"code": error.code, "message": error.message, "hint": error.hint} if error else None


def fail(message: str, *, code: str, exit_code: int, as_json: bool, hint: str = "") -> int:
    """Print an error on stderr as docs/cli.md has it; returns `exit_code`."""
    if as_json:
        error = {"code": code, "message": message, "hint": hint}
        click.echo(json.dumps({"schema": SCHEMA, "error": error}, ensure_ascii=False), err=True)
    else:
        click.echo(f"fleet: {message}", err=True)
        if hint:
            click.echo(f"  {hint}", err=True)
    return exit_code


def _json_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
