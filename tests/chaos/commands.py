"""Command lines that write down when they run, with nothing but a shell."""

from __future__ import annotations

_NOTE = (
    'note() { read -r at _ </proc/uptime; printf \'{"at":%s,"event":"%s","who":"job","job":"%s","fence":%s,'
    '"worker":"%s","pid":%s}\\n\' "$at" "$1" "$FLEET_JOB_ID" "$FLEET_FENCE" "$FLEET_WORKER" $$'
    ' >>"$CHAOS_HISTORY"; }; '
)


def work(seconds: float = 0.0) -> tuple[str, ...]:
    """Run for a while, giving signs of life, and saying something."""
    ticks = "".join("sleep 0.1; note tick; echo working; " for _ in range(round(seconds * 10)))
    return ("sh", "-c", f"{_NOTE} note start; {ticks} note end")


def fail() -> tuple[str, ...]:
    """Fail, always."""
    return ("sh", "-c", f"{_NOTE} note start; note end; exit 3")


def fail_at_first() -> tuple[str, ...]:
    """Fail in the first run, as told by a file beside the history."""
    script = f'{_NOTE} note start; mark="$CHAOS_HISTORY.$FLEET_JOB_ID"; note end; '
    return ("sh", "-c", f'{script} if [ -e "$mark" ]; then exit 0; fi; : >"$mark"; exit 3')
