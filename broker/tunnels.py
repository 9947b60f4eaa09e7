"""What tunnels tell the fleet of themselves: a note for each, gone soon after whoever holds it is.

A tunnel brings Redis to one host through the SSH connection of one operator. Its workers name it in
their records, so `fleet status` can say of each whether what it hangs on is there, from any machine.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import redis

from broker import keys

#: seconds for which a note is believed
NOTE_SECONDS = 30
_NOBODY = "nobody holds it: 'fleet up' where it was begun brings it back"


@dataclass(frozen=True)
class Note:
    """How a tunnel is: `by` is who holds it, user@machine; `error` says why it is down."""

    state: Literal["up", "down"]
    by: str
    error: str = ""


def fleet_id(client: redis.Redis, *, make: bool) -> str | None:
    """What is the same fleet, however its Redis is named; None where it has no name yet and gets none."""
    if make:
        client.set(keys.FLEET_ID, uuid.uuid4().hex[:12], nx=True)
    found: Any = client.get(keys.FLEET_ID)
    return found.decode() if found else None


def report(client: redis.Redis, fleet: str, notes: Mapping[str, Note]) -> None:
    """Write the notes of tunnels, by id. The fleet keeps its name, should Redis have been emptied."""
    with client.pipeline(transaction=False) as pipe:
        pipe.set(keys.FLEET_ID, fleet, nx=True)
        for tunnel_id, note in notes.items():
            pipe.set(keys.tunnel(tunnel_id), json.dumps(asdict(note)), ex=NOTE_SECONDS)
        pipe.execute()


def forget(client: redis.Redis, tunnel_ids: Iterable[str]) -> None:
    """Remove the notes of tunnels that are no more."""
    gone = [keys.tunnel(tunnel_id) for tunnel_id in tunnel_ids]
    if gone:
        client.delete(*gone)


def read(client: redis.Redis, tunnel_ids: Iterable[str]) -> dict[str, Note]:
    """The note of each tunnel: down where nobody has written one lately."""
    wanted = list(tunnel_ids)
    rows: list[Any] = client.mget(map(keys.tunnel, wanted)) if wanted else []
    return {tunnel_id: _note(row) for tunnel_id, row in zip(wanted, rows, strict=True)}


def _note(text: Any) -> Note:
    """The note that Redis holds; down where it holds none that can be read."""
    try:
        fields = json.loads(text)
        return Note(fields["state"], str(fields["by"]), str(fields["error"]))
    except (ValueError, TypeError, LookupError):
        return Note("down", "", _NOBODY)
