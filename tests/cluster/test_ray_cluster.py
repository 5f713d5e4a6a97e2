"""`grscale run --ray`: a real cluster of three raylets that want a token, and what happens when parts of it are killed.

One cluster serves the tests in their order: the last one kills its head.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from cluster.ray_cluster import reachable
from tests.cluster.conftest import write_fake_jobs
from tests.cluster.test_run import driver, finished, wait_for_training

pytestmark = pytest.mark.slow
ONE = "sid.ladder=[{name: xs, layers: 1, d_model: 8, heads: 1, d_kv: 8, d_ff: 8}]"
RAY = str(Path(sys.executable).with_name("ray"))
ALIVE = """
import ray, sys
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(*(node["NodeID"] for node in ray.nodes() if node["Alive"]))
"""


class Cluster:
    """Processes of `ray start`, each with its raylet. The first one has the head and no cores: trials are on the others."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.address = f"127.0.0.1:{port}"
        self.runs = folder / "runs.txt"
        self.secrets = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.jobs = write_fake_jobs(folder)
        self.env = os.environ | self.jobs | self.secrets
        self.log = (folder / "ray.log").open("ab")
        self.parts: list[subprocess.Popen[bytes]] = []
        self.head = self.start(
            "--head", "--port", port, "--temp-dir", str(folder), "--include-dashboard=false", "--num-cpus", "0"
        )

    def start(self, *options: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        words = [*before, RAY, "start", "--block", "--node-ip-address", "127.0.0.1", "--object-store-memory", "80000000"]
        words += options
        part = subprocess.Popen(words, env=self.env, stdout=self.log, stderr=self.log, start_new_session=True)
        self.parts.append(part)
        return part

    def add(self, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Returns when it is there. Ray gives a raylet 30 s to start, which a busy machine may not keep: then another starts."""
        others = self.alive()
        for _ in range(4):
            part = self.start("--address", self.address, "--num-cpus", "2", before=before)
            while part.poll() is None:
                if self.alive() - others:
                    return part
        raise AssertionError(Path(self.log.name).read_text())

    def alive(self) -> set[str]:
        """The ids of the raylets. Who asks through one that was just killed gets no answer, which is not that there are none."""
        words = [sys.executable, "-c", ALIVE, self.address]
        for _ in range(5):
            asked = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=240)
            if asked.returncode == 0:
                return set(asked.stdout.split())
            time.sleep(2.0)
        raise AssertionError(asked.stderr)

    def kill(self, part: subprocess.Popen[bytes]) -> None:
        """It and all that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(part.pid), *psutil.Process(part.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        part.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="gr", dir="/tmp"))  # the paths of Ray's sockets have to be short
    found = Cluster(folder)
    try:
        while not reachable(found.address):
            assert found.head.poll() is None, Path(found.log.name).read_text()
            time.sleep(0.5)
        found.add()
        found.add()
        yield found
    finally:
        for part in found.parts:
            found.kill(part)
        found.log.close()
        shutil.rmtree(folder)


@pytest.fixture
def joined(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `driver` needs to join the cluster; the file returned has a line per stage that ran."""
    for name, value in (cluster.jobs | cluster.secrets | {"RAY": cluster.address}).items():
        monkeypatch.setenv(name, value)
    cluster.runs.write_text("")
    return cluster.runs


def test_without_its_token_nobody_gets_in(
    study_file: Path, tmp_path: Path, joined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    _, err = finished(driver(study_file, tmp_path / "out"), 2)
    assert "its token is given by RAY_AUTH_TOKEN" in err and joined.read_text() == ""


def test_a_trial_whose_raylet_is_killed_runs_again_elsewhere(study_file: Path, tmp_path: Path, joined: Path) -> None:
    process = driver(study_file, tmp_path / "out", "seeds=[98]", ONE)
    [job] = wait_for_training(tmp_path / "out", process)
    raylet = next(parent for parent in job.parents() if "raylet" in parent.name())
    raylet.kill()
    out, err = finished(process, 0)
    ran = [line.split("-")[0] for line in joined.read_text().splitlines()]
    assert ran.count("train_sid") == 2 and ran.count("evaluate_sid") == 1 and ran.count("quantize") == 1, out + err
    assert not job.is_running()


def test_a_machine_that_can_not_see_the_folder_is_named(study_file: Path, tmp_path: Path, joined: Path, cluster: Cluster) -> None:
    if os.geteuid() != 0:
        pytest.skip("a mount of its own for one raylet needs root")
    (tmp_path / "out").mkdir()
    blind = cluster.add(blinded(tmp_path / "out"))
    try:
        _, err = finished(driver(study_file, tmp_path / "out"), 2)
        assert "--ray: machine " in err and f"can't see {tmp_path / 'out'}; it has to lie on a file system" in err
        assert joined.read_text() == "" and not list((tmp_path / "out").glob("work/.probe*"))
    finally:
        cluster.kill(blind)


def test_a_machine_that_joins_and_can_not_see_the_folder_gets_no_work(
    study_file: Path, tmp_path: Path, joined: Path, cluster: Cluster
) -> None:
    """The first trainings hold the cores of the machines that are there; the others wait, and would start on the new one."""
    if os.geteuid() != 0:
        pytest.skip("a mount of its own for one raylet needs root")
    (tmp_path / "out").mkdir()
    process = driver(study_file, tmp_path / "out", "seeds=[1000, 1001, 1002]")
    wait_for_training(tmp_path / "out", process)
    blind = cluster.add(blinded(tmp_path / "out"))
    try:
        assert process.stderr is not None
        said = next((line for line in process.stderr if "it gets no work" in line), "")
        joined.with_name("go").touch()
        finished(process, 0)
        assert said.startswith("machine ") and f"can't see {tmp_path / 'out'}; it has to lie on a file system" in said
        ran = [line.split("-")[0] for line in joined.read_text().splitlines()]
        assert ran.count("train_sid") == 6 and not list((tmp_path / "out").glob("work/.probe*"))
    finally:
        cluster.kill(blind)


def blinded(folder: Path) -> list[str]:
    """Words before a command that let it see nothing in FOLDER."""
    return ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]


def test_when_the_head_is_killed_nothing_goes_on_and_a_rerun_completes(
    study_file: Path, tmp_path: Path, joined: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = driver(study_file, tmp_path / "out", "seeds=[98]", ONE)
    [job] = wait_for_training(tmp_path / "out", process)
    cluster.kill(cluster.head)
    killed = time.monotonic()
    _, err = finished(process, 1)
    assert "the cluster's head at" in err and "run the same command to go on" in err
    psutil.wait_procs([job], timeout=60)
    print(f"the last job ended {time.monotonic() - killed:.0f} s after the head")
    assert not job.is_running()
    joined.write_text("")
    monkeypatch.delenv("RAY")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    finished(driver(study_file, tmp_path / "out", "seeds=[98]", ONE), 0)
    assert [line.split("-")[0] for line in joined.read_text().splitlines()] == ["train_sid", "evaluate_sid"]
