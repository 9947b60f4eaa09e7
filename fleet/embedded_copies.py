"""Backup and restore of the embedded Redis: its data as one RDB file, out and in again."""

from __future__ import annotations

import dataclasses
import shutil
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.errors import Conflict, FleetError, UsageError
from fleet import redis_server
from fleet.embedded_folder import COMMAND_SECONDS, FOLDER_HINT, BrokerFolder, Record, atomic_file
from fleet.listening import LOOPBACK
from fleet.redis_server import ServerDied, ServerProgram, wait_until

if TYPE_CHECKING:
    import redis


def keys_in(info: Mapping[str, Any]) -> int:
    """Keys of all databases, by the section `keyspace` of INFO."""
    return sum(
        part["keys"] for name, part in info.items() if name.startswith("db") and isinstance(part, dict)
    )


# --- backup ----------------------------------------------------------------------------------------


def back_up(client: redis.Redis, data_dir: Path, file: Path, *, force: bool) -> int:
    """Copy what the server of `client` holds at one moment to `file`; returns its bytes.

    `data_dir` is the server's. Raises Conflict when `file` exists, unless `force`, and
    FleetError when it cannot be written or the server cannot save.
    """
    _check_target(file, force)
    try:
        with atomic_file(file) as target:
            _save(client)
            snapshot = data_dir / "dump.rdb"
            with snapshot.open("rb") as source:
                snapshot.unlink()  # nobody shall take it for the data: Redis reads the append-only file
                shutil.copyfileobj(source, target, 1 << 20)
            return target.tell()
    except OSError as exc:
        where = f" ({exc.filename})" if exc.filename else ""
        raise FleetError(f"cannot back up to {file}: {exc.strerror or exc}{where}") from exc


def _check_target(file: Path, force: bool) -> None:
    if not file.parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}")
    if file.exists() and not file.is_file():
        raise UsageError(f"{file} is no ordinary file")
    if file.exists() and not force:
        raise Conflict(f"{file} exists", "Give another name, or --force to replace it.")


def _save(client: redis.Redis) -> None:
    """Have a snapshot written that begins now."""

    def done() -> bool:
        return not client.info("persistence")["rdb_bgsave_in_progress"]

    saved = wait_until(lambda: _save_accepted(client), COMMAND_SECONDS) and wait_until(done, COMMAND_SECONDS)
    if not saved:
        raise FleetError(f"the embedded Redis has not saved its data within {COMMAND_SECONDS:.0f} s")
    if client.info("persistence")["rdb_last_bgsave_status"] != "ok":
        raise FleetError(
            "the embedded Redis could not save its data",
            "Its disk may be full: a snapshot is written beside the data first. broker.log says why.",
        )


def _save_accepted(client: redis.Redis) -> bool:
    """Begin a snapshot; False while another child of the server is at work: what that saves is older."""
    from redis import exceptions

    try:
        client.bgsave(schedule=False)
    except exceptions.ResponseError as exc:
        if "in progress" in str(exc) or "child process" in str(exc):
            return False
        raise FleetError(f"the embedded Redis cannot save: {exc}") from exc
    return True


# --- restore ---------------------------------------------------------------------------------------


def check_magic(file: Path) -> None:
    """Raise UsageError unless `file` begins as an RDB of Redis or Valkey does."""
    try:
        with file.open("rb") as source:
            magic = source.read(9)
    except OSError as exc:
        raise UsageError(f"cannot read {file}: {exc.strerror or exc}") from exc
    if not magic.startswith((b"REDIS0", b"VALKEY")):
        raise UsageError(f"{file} is no backup: it begins with {magic!r}, not as an RDB does")


def restore(
    folder: BrokerFolder, file: Path, programs: Callable[[], list[ServerProgram]]
) -> tuple[int, Path | None]:
    """Make the RDB `file` the data of a stopped broker; returns (keys, folder the old data went to).

    Raises UsageError for a file that none of `programs` can load, FleetError when the disk
    is full; the data is then as it was.
    """
    try:
        _make_room(folder)
        keys, program = _converted(file, folder.incoming_dir, programs())
        return keys, _install(folder, program)
    finally:
        shutil.rmtree(folder.incoming_dir, ignore_errors=True)


def _make_room(folder: BrokerFolder) -> None:
    """An empty folder beside the data: on the same file system, so that it can be renamed."""
    for left in (folder.incoming_dir, folder.restored_dir):
        if left.exists():
            shutil.rmtree(left)
    folder.incoming_dir.mkdir(mode=0o700)


def _converted(file: Path, incoming: Path, programs: list[ServerProgram]) -> tuple[int, ServerProgram]:
    """Make `incoming` a data folder by the first program that can load `file`; returns (keys, program)."""
    shutil.copyfile(file, incoming / "dump.rdb")
    faults = []
    for program in programs:
        try:
            with redis_server.throwaway(program, incoming) as client:
                keys = _rewrite_as_append_only(client)
            (incoming / "dump.rdb").unlink()
            return keys, program
        except ServerDied as exc:
            faults.append(f"{program.path} ({program.version}):\n{exc}")
    raise UsageError(f"{file} cannot be loaded by " + "\n".join(faults), "The data is as it was.")


def _rewrite_as_append_only(client: redis.Redis) -> int:
    """Have a server write what it has loaded as an append-only file; returns the number of keys.

    With an append-only file switched on from the start, Redis reads nothing else: this is
    the way for an RDB to become one, in every version.
    """
    keys = keys_in(client.info("keyspace"))
    client.config_set("appendonly", "yes")

    def done() -> bool:
        info = client.info("persistence")
        if info["aof_last_bgrewrite_status"] != "ok":
            raise FleetError("the data could not be written as an append-only file", FOLDER_HINT)
        return not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]

    if not wait_until(done, COMMAND_SECONDS):
        raise FleetError(f"the data was not written within {COMMAND_SECONDS:.0f} s")
    return keys


def _install(folder: BrokerFolder, program: ServerProgram) -> Path | None:
    """Put what came in in the place of the data; returns where that went, None if there was none.

    Killed between the renames it leaves a complete `data.restored`: see BrokerFolder.finish_restore.
    """
    kept = None
    folder.incoming_dir.rename(folder.restored_dir)
    if folder.data_dir.exists():
        kept = _unused(folder.path, f"data.before-restore-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        folder.data_dir.rename(kept)
    folder.restored_dir.rename(folder.data_dir)
    last = folder.read_record() or Record(socket.gethostname(), 0, (LOOPBACK,), program)
    folder.write_record(dataclasses.replace(last, program=program))
    return kept


def _unused(folder: Path, name: str) -> Path:
    number = 0
    path = folder / name
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}"
    return path
