"""One frozen settings object: flags, then FLEET_* variables, ./fleet.toml, the user's file.

Built once, passed down; nothing else reads the environment. The only module that knows
pydantic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from broker.errors import ConfigError
from broker.worker_settings import Count, Seconds, WorkerSettings


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SshSettings(_Frozen):
    """How hosts are reached."""

    #: connections and bootstraps under way at once
    max_parallel: Count = 10
    #: seconds to connect
    connect_timeout_seconds: Seconds = 30.0
    #: seconds any one remote command may take; an install gets ten times as long
    command_timeout_seconds: Seconds = 30.0


class JobSettings(_Frozen):
    """How jobs are treated that are submitted here."""

    #: what becomes of a job where one that it waits for does not finish
    on_failed_dependency: Literal["fail", "wait"] = "fail"


class Settings(BaseSettings):
    """Everything that can be set. Frozen; see the field comments for units."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="FLEET_", env_nested_delimiter="__"
    )

    #: redis://, rediss://, unix:// or redis+sentinel:// ; none: the embedded broker of this user
    redis_url: str | None = None
    #: file whose first line is the password of Redis, for a URL without one
    redis_password_file: Path | None = None
    #: of the logs of workers: "human" is `TIME LEVEL MESSAGE`, "json" an object a line
    log_format: Literal["human", "json"] = "human"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    worker: WorkerSettings = WorkerSettings()
    ssh: SshSettings = SshSettings()
    jobs: JobSettings = JobSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, project file, user's file: the first that knows a field wins."""
        del env_settings, dotenv_settings, file_secret_settings
        flags = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        return tuple(source for _, source in _sources(flags))


def user_config_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the user's own settings are: $XDG_CONFIG_HOME or ~/.config, fleet/config.toml."""
    home = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "fleet" / "config.toml"


#: variables that would set a whole group of fields at once
_GROUPS = ("fleet_worker", "fleet_ssh", "fleet_jobs")


class _FleetEnvironment(EnvSettingsSource):
    """The FLEET_* variables that are settings; those a job is given (FLEET_JOB_ID) are not.

    FLEET_WORKER is one of these: the fields of `worker` are set one by one, as FLEET_WORKER__...
    """

    def __init__(self, settings_cls: type[BaseSettings], **options: Any) -> None:
        super().__init__(settings_cls, **options)
        self.env_vars = {name: value for name, value in self.env_vars.items() if name not in _GROUPS}

    def __call__(self) -> dict[str, Any]:
        known = set(Settings.model_fields)
        return {name: value for name, value in super().__call__().items() if name in known}


def _sources(flags: Mapping[str, Any]) -> Iterator[tuple[str, PydanticBaseSettingsSource]]:
    """(where, source) in order of precedence."""
    yield "flag", InitSettingsSource(Settings, init_kwargs=dict(flags))
    yield "environment", _FleetEnvironment(Settings, env_prefix="FLEET_", env_nested_delimiter="__")
    for path in (Path("fleet.toml"), user_config_file()):
        yield str(path), TomlConfigSettingsSource(Settings, path)


def load(flags: Mapping[str, Any] | None = None) -> Settings:
    """Build the settings in force.

    `flags` holds what the command line set, nested like the settings themselves.
    Raises ConfigError, which names the setting, its value's fault and where it came from.
    """
    flags = flags or {}
    try:
        return Settings(**flags)
    except ValidationError as exc:
        raise _explained(exc, flags) from exc
    except (OSError, ValueError) as exc:
        raise ConfigError(f"fleet.toml or {user_config_file()}: {exc}", "Mend the TOML file.") from exc


def origins(flags: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Where each setting in force came from, by dotted name; those left out are defaults."""
    found: dict[str, str] = {}
    for where, source in _sources(flags or {}):
        for name in _dotted(source()):
            found.setdefault(name, where)
    return found


def flattened(settings: Settings) -> dict[str, Any]:
    """The settings by dotted name, as JSON values."""
    return dict(_leaves(settings.model_dump(mode="json")))


def worker_environ(settings: Settings) -> dict[str, str]:
    """The variables that give a worker elsewhere the settings in force here: those that are no defaults."""
    default = WorkerSettings()
    return {
        f"FLEET_WORKER__{name.upper()}": f"{value}"
        for name, value in settings.model_dump()["worker"].items()
        if value != getattr(default, name)
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _dotted(tree: Mapping[str, Any]) -> Iterator[str]:
    return (name for name, _ in _leaves(tree))


def _explained(exc: ValidationError, flags: Mapping[str, Any]) -> ConfigError:
    """The first fault of `exc`, with the setting and where its value came from."""
    fault = exc.errors()[0]
    name = ".".join(str(part) for part in fault["loc"])
    where = origins(flags).get(name, "unknown")
    return ConfigError(
        f"setting {name} ({where}): {fault['msg']}, got {fault['input']!r}",
        "'fleet config show --origin' lists every setting; docs/cli.md explains them.",
    )
