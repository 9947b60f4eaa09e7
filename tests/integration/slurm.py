"""A real Slurm of four virtual nodes on this machine, with ports and a munge of its own.

    cluster = SlurmCluster(folder).start()
    cluster.conf                      # for SLURM_CONF
    cluster.run("squeue")             # one of Slurm's commands

Nodes n1 to n4 have 4 CPUs, 4000 MB and 2 GPUs each, as far as Slurm knows. Daemons run in the foreground as
our children, and are ended by their own PIDs.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.conftest import SESSION_MARK, find_free_port, find_program, wait_until

NODES = ("n1", "n2", "n3", "n4")
#: seconds between SIGTERM and SIGKILL when a job is ended
KILL_WAIT_SECONDS = 10
_CONF = """\
GresTypes=gpu
ClusterName=fleettest
SlurmctldHost=localhost(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
KillWait={kill_wait}
JobRequeue=1
SlurmctldTimeout=60
SlurmdTimeout=300
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=1:00:00 State=UP OverSubscribe=NO PriorityTier=1
PartitionName=urgent Nodes=n[1-4] MaxTime=1:00:00 State=UP OverSubscribe=NO PriorityTier=2
"""
_NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 Gres=gpu:2"
)


class SlurmCluster:
    """munged, slurmctld and four slurmd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environ = {**os.environ, "SLURM_CONF": str(self.conf)}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> SlurmCluster:
        """Start all of it, and wait until the nodes are idle."""
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self._write_files()
        self._daemon(
            "munged",
            *("--foreground", "--force", f"--socket={self.folder}/munge.socket"),
            *(f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")),
        )
        wait_until((self.folder / "munge.socket").exists, message="munged is up")
        self._daemon("slurmctld", "-D", "-c", "-f", self.conf)
        for node in NODES:
            self._daemon("slurmd", "-D", "-f", self.conf, "-N", node)
        wait_until(lambda: self.nodes("idle") == list(NODES), message="all nodes are idle")
        return self

    def run(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environ, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def nodes(self, state: str) -> list[str]:
        """The nodes in that state."""
        return sorted(set(self.run("sinfo", "-hN", "-t", state, "-o", "%N", check=False).split()))

    def queue(self, form: str = "%A %T", *options: str) -> list[str]:
        """Allocations that have not ended, each in that form."""
        return self.run("squeue", "-h", "-r", "-o", form, *options, check=False).splitlines()

    def clear(self) -> None:
        """Nothing runs, nothing waits, and all nodes are there again."""
        if self.queue():
            self.run("scancel", "--user=root", check=False)
            wait_until(lambda: not self.queue(), message="all jobs have ended")
        for node in set(NODES) - set(self.nodes("idle")):
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        wait_until(lambda: self.nodes("idle") == list(NODES), message="all nodes are idle")

    def stop(self) -> None:
        """End all of it; what its jobs left goes too."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._steps():
            process.kill()

    def _steps(self) -> list[psutil.Process]:
        """What slurmd has started and not ended: known by the mark that it inherits, and its name."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.name() == "slurmstepd" and process.environ().get("SLURM_CONF") == str(self.conf):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _write_files(self) -> None:
        nodes = "\n".join(_NODE.format(name=node, port=find_free_port()) for node in NODES)
        self.conf.write_text(
            _CONF.format(folder=self.folder, port=find_free_port(), kill_wait=KILL_WAIT_SECONDS, nodes=nodes)
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for number in range(2):  # devices that are there everywhere: plain files would not be counted
            os.mknod(self.folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu File={self.folder}/gpu[0-1]\n")

    def _daemon(self, program: str, *arguments: str | Path) -> None:
        path = find_program(program)
        assert path is not None
        assert SESSION_MARK in self.environ
        with open(self.folder / f"{program}.said", "ab") as said:
            words: Sequence[str] = [path, *map(str, arguments)]
            # a group of its own: Ctrl-C is for the tests
            daemon = subprocess.Popen(
                words,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self._daemons.append(daemon)
