"""HyperQueue: its server and one worker with two cores, both in a process of their own (`LocalCluster`).

Promised: a task whose worker dies runs again on another; stdout and stderr of each go to files,
as ours do. Not promised: that anything outlives the server, for its Python package keeps no
journal (the `hq` program can); results are exit codes. Tasks are submitted before the worker
is added. When each task began is read from its output file, since progress is told once a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig

from benchmarks import harness
from benchmarks.harness import REPOSITORY, Site
from benchmarks.peers.base import COMMAND, Peer


class HyperQueue(Peer):
    name = "hyperqueue"
    packages = ("hyperqueue",)
    paces = {COMMAND: 700}

    def rate(self, site: Site, work: str, jobs: int, slots: int) -> float:
        with tempfile.TemporaryDirectory(dir=site.folder) as folder:
            command = harness.python("-m", __name__, str(jobs), str(slots), folder)
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
            )
        return float(done.stdout.splitlines()[-1])


def main(jobs: int, slots: int, folder: Path) -> float:
    """Tasks a second from the tenth part to the last."""
    os.chdir(folder)
    server = folder / "server"
    server.mkdir()
    with LocalCluster(str(server)) as cluster:
        client = cluster.client()
        job = Job(max_fails=None)
        for _ in range(jobs):
            job.program(["true"])
        submitted = client.submit(job)
        cluster.start_worker(WorkerConfig(cores=slots))
        client.connection.wait_for_jobs([submitted.id], lambda _: None)
    begun = sorted(file.stat().st_mtime for file in folder.glob("*.stdout"))
    first = max(1, jobs // 10)
    return (len(begun) - 1 - first) / (begun[-1] - begun[first])


PEERS = {"hyperqueue": HyperQueue()}

if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
