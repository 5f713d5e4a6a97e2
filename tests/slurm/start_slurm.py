"""A real Slurm on this machine, for the tests: controller, two nodes with two make-believe GPUs each, all on loopback.

Everything lies in one temporary folder, configuration and munge key included; a Slurm that is installed and running here is not
touched. Needs no root: daemons and jobs are all the same user's. By hand: ``python -m tests.slurm.start_slurm`` prints the
environment to set and keeps it up until Ctrl-C.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.lifeline import die_with_parent

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
SBIN = "/usr/sbin:/sbin"

CONF = """\
ClusterName=grscale-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=30
JobRequeue=1
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 PreemptMode=OFF
PartitionName=low Nodes=n1,n2 MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Why no Slurm can be started here; empty when one can."""
    path = os.environ["PATH"] + ":" + SBIN
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)" if absent else ""


class Slurm:
    """The running daemons. ``environment``: what a process needs so that sbatch and the others talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{SBIN}"}
        for name in [name for name in self.environment if name.startswith(("SBATCH_", "SQUEUE_")) or name == "SLURM_JOB_ID"]:
            del self.environment[name]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        controller, *ports = free_ports(1 + len(NODES))
        user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname().split(".")[0]
        (self.folder / "state").mkdir()
        for gpu in range(2):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        named = dict(zip(NODES, ports, strict=True))
        text = CONF.format(host=host, user=user, folder=self.folder, controller=controller, **named)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        munge = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("pid-file", "log-file", "seed-file", "socket")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *munge)
        _until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def wait_for_nodes(self) -> None:
        def ready() -> bool:
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise AssertionError(f"{name} ended: {(self.folder / f'{name}.out').read_text()[-2000:]}")
            return self("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split() == ["idle"] * len(NODES)

        _until(ready, "two idle nodes")

    def _daemon(self, program: str, *arguments: str, name: str = "") -> None:
        with (self.folder / f"{name or program}.out").open("ab") as out:
            self.daemons[name or program] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def __call__(self, *command: str, check: bool = True) -> str:
        """Runs one of Slurm's commands; returns its stdout."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{command}: exit {done.returncode}: {done.stderr}")
        return done.stdout

    def state(self, job: str) -> str:
        """The job's state, such as RUNNING; empty when Slurm no longer knows it."""
        return self("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False).strip()

    def stop(self) -> None:
        jobs = self("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self("scancel", "--signal=KILL", "--full", *jobs, check=False)
            self("scancel", *jobs, check=False)
        with contextlib.suppress(AssertionError):
            _until(lambda: not self("squeue", "-h", "-o", "%A", check=False).split(), "an empty queue", 40)
        for name in ("n1", "n2", "slurmctld", "munged"):
            self.stop_daemon(name)

    def stop_daemon(self, name: str) -> None:
        daemon = self.daemons.pop(name, None)
        if daemon is not None:
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextlib.contextmanager
def running() -> Iterator[Slurm]:
    """A Slurm in a new temporary folder, of a short name: its sockets' paths have to fit in 108 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(n: int) -> list[int]:
    """Ports that nobody on loopback listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _until(done: object, what: str, seconds: float = 30) -> None:
    assert callable(done)
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


if __name__ == "__main__":
    if why := missing():
        sys.exit(why)
    with running() as slurm:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
