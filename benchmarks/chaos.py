"""The long storm: very many jobs, workers and Redis killed over and over, and ten properties proved.

    python -m benchmarks.chaos [--jobs 100000] [--kills 300] [--restarts 20] [--minutes 12] [--seed N]
    python -m benchmarks.chaos --failpoints      every call of a worker's life, with every fault

It is tests/chaos at length (docs/reliability.md says what is done and what is counted) and needs what the
tests need: run it with their environment. It ends with a table, writes the same as JSON, and its exit code
is 1 if anything contradicts a property or misses a goal. The seed decides all that is random in it, though
not when processes happen to run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from broker import __version__
from tests.chaos import figures, lives
from tests.chaos.checker import Violation, check
from tests.chaos.figures import Figures
from tests.chaos.harness import Harness
from tests.chaos.storm import Plan, Storm

#: seconds beyond the lease within which the jobs of a dead worker must be back in their queues, at p99
RECOVERY_SECONDS = 5.0
#: seconds in which Redis is there again after it was killed or stopped, at most
_RESTART_SECONDS = 3.0
#: violations that are shown
_SHOWN = 20


def main() -> int:
    """Run, judge, print; returns the exit code."""
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="fleet-chaos-", dir=arguments.folder))
    print(f"history and journal: {folder}, removed if all is well", flush=True)
    harness = Harness(folder).start()
    try:
        code = _failpoints(harness) if arguments.failpoints else _storm(harness, arguments)
    finally:
        harness.close()
    if code == 0:
        shutil.rmtree(folder)
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=300, help="SIGKILLs of workers")
    parser.add_argument("--restarts", type=int, default=20, help="ends of Redis, half of them by SIGKILL")
    parser.add_argument("--faults", type=int, help="all other faults together (default: as many as kills)")
    parser.add_argument("--minutes", type=float, default=12.0, help="how long jobs come and faults go on")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--lease", type=float, default=6.0, help="seconds")
    parser.add_argument("--slow", type=float, default=0.2, help="share of jobs that take 0.1 to 0.6 s")
    parser.add_argument("--seed", type=int, help="of another run, to have its choices again")
    parser.add_argument("--json", type=Path, help="where to write the figures", metavar="FILE")
    parser.add_argument("--folder", help="where to put history and journal for the time of the run")
    parser.add_argument("--failpoints", action="store_true", help="scripted lives instead of a storm")
    return parser.parse_args()


# --- the storm -------------------------------------------------------------------------------------


def _storm(harness: Harness, arguments: argparse.Namespace) -> int:
    plan = _plan(arguments)
    words = f"{plan.jobs} jobs, {plan.worker_kills} kills, {plan.redis_restarts} restarts"
    print(f"seed {plan.seed}: {words}", flush=True)
    began = time.monotonic()
    Storm(harness, plan, lambda text: print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)).run()
    seconds = time.monotonic() - began
    print(f"{seconds:7.1f} s  all workers have left; judging", flush=True)
    evidence = harness.evidence()
    violations = check(evidence)
    found = figures.of(evidence, violations, outage_seconds=arguments.lease + _RESTART_SECONDS)
    missed = list(_missed(found, arguments.lease))
    _show(found, violations, missed)
    _write(arguments, plan, found, seconds, missed)
    return 1 if missed else 0


def _plan(arguments: argparse.Namespace) -> Plan:
    return Plan(
        seed=secrets.randbelow(10**6) if arguments.seed is None else arguments.seed,
        jobs=arguments.jobs,
        seconds=60 * arguments.minutes,
        workers=arguments.workers,
        worker_kills=arguments.kills,
        redis_restarts=arguments.restarts,
        other_faults=arguments.kills if arguments.faults is None else arguments.faults,
        slow=arguments.slow,
        slots=(1, 1, 2),
        absent_seconds=RECOVERY_SECONDS + 2.0,  # or the next life would hide a recovery that is late
        settings={"lease_seconds": arguments.lease, "heartbeat_seconds": arguments.lease / 4},
    )


def _missed(found: Figures, lease: float) -> Iterator[str]:
    """The goals that this run did not reach."""
    if found.violations:
        yield f"{found.violations} violations"
    if found.extra_after_deaths > found.worker_deaths:
        yield f"{found.extra_after_deaths} extra executions after {found.worker_deaths} deaths of workers"
    recovery = found.recovery_p99_without_outage_seconds or 0.0
    if recovery > lease + RECOVERY_SECONDS:
        yield f"recovery p99 {recovery:.1f} s where no outage of Redis met it, lease {lease:g} s"


def _show(found: Figures, violations: Sequence[Violation], missed: Sequence[str]) -> None:
    for violation in violations[:_SHOWN]:
        print(violation)
    print("\n".join(f"| {name} | {value} |" for name, value in _rows(found)))
    print("\n".join(f"MISSED: {goal}" for goal in missed) or "all goals reached")


def _rows(found: Figures) -> Iterator[tuple[str, str]]:
    """The table, in words."""
    for name, value in asdict(found).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in sorted(value.items()))
        elif isinstance(value, float):
            value = f"{value:.2f}"
        yield name.replace("_", " "), str(value)


def _write(
    arguments: argparse.Namespace, plan: Plan, found: Figures, seconds: float, missed: Sequence[str]
) -> None:
    document: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.chaos", *sys.argv[1:]]),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "version": __version__,
        "plan": asdict(plan),
        "seconds": round(seconds, 1),
        "figures": asdict(found),
        "missed": list(missed),
    }
    text = json.dumps(document, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    else:
        print(text)


# --- every call, every fault -----------------------------------------------------------------------


def _failpoints(harness: Harness) -> int:
    wanted = lives.faults(lives.calls_of_a_life(harness))
    print(f"{len(wanted)} lives, each with a fault of its own", flush=True)
    lived = lives.live(harness, wanted)
    found = lives.evidence_of(harness, lived)
    violations = [(life.fault, violation) for life in lived for violation in check(found[life.database])]
    for fault, violation in violations[:_SHOWN]:
        print(f"{fault}: {violation}")
    for how, count in sorted(lives.tally(found.values()).items()):
        print(f"| {how} | {count} |")
    print(f"{len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
