"""One Slurm for all tests of this folder that need a real one."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm import start_slurm
from tests.slurm.start_slurm import Slurm


@pytest.fixture(scope="session")
def running_slurm() -> Iterator[Slurm]:
    if why := start_slurm.missing():
        pytest.skip(why)
    with start_slurm.running() as slurm:
        yield slurm


@pytest.fixture
def slurm(running_slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """The environment of this process is that of the Slurm: what `grscale submit` starts here talks to it."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, running_slurm.environment[name])
    for name in [name for name in os.environ if name.startswith(("RAY_AUTH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"))]:
        monkeypatch.delenv(name)
    running_slurm.wait_for_nodes()
    return running_slurm


def until(done: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that name the folder, or work in it: the study's."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            words = process.info["cmdline"] or []
            if any(str(folder) in word for word in words):
                found.append(process)
    return found


def leftovers(job: str) -> list[Path]:
    """What a Ray cluster of the job left in /tmp."""
    folder = Path(f"/tmp/grscale-{job}")
    return [folder] if folder.exists() else []
