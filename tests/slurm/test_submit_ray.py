"""`grscale submit ray` against a real Ray with its dashboard on this machine."""

import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import cli
from tests.conftest import ROOT
from tests.slurm.conftest import until
from tests.slurm.start_slurm import free_ports
from tests.slurm.test_slurm import STUDY


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of the dashboard of a Ray that wants a token."""
    for name, value in (
        ("RAY_AUTH_MODE", "token"),
        ("RAY_AUTH_TOKEN", secrets.token_hex(32)),
        ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0"),
    ):
        monkeypatch.setenv(name, value)
    port, web, agent = free_ports(3)  # the agent that starts jobs has a fixed port, which another Ray here may hold
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--include-dashboard=true"]
        words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={web}", f"--temp-dir={folder}", "--num-cpus=2"]
        words += [f"--dashboard-agent-listen-port={agent}"]
        words += ["--object-store-memory=104857600", "--disable-usage-stats", "--block"]
        with (Path(folder) / "start.log").open("wb") as log:
            head = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        try:
            until(lambda: _listens(web), "the dashboard answers", 120)
            yield f"http://127.0.0.1:{web}"
        finally:
            head.terminate()
            head.wait(60)


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
@pytest.mark.slow
def test_a_study_runs_as_a_job_of_a_ray_cluster(dashboard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "o u't"
    study.write_text(STUDY)
    words = ["submit", "ray", str(study), "--address", dashboard, "--out", str(out)]
    deadline = time.monotonic() + 120
    while (code := cli.main(words)) != 0 and time.monotonic() < deadline:
        assert "No available agent" in capsys.readouterr().err  # Ray's head is still starting
        time.sleep(2)
    assert code == 0 and "submitted job raysubmit_" in capsys.readouterr().out
    until(lambda: (out / "report" / "index.html").is_file(), "the report is written", 180)


def test_where_nothing_listens_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY)
    assert cli.main(["submit", "ray", str(study), "--address", "http://127.0.0.1:1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "submit ray: --address http://127.0.0.1:1: Failed to connect" in error and len(error.splitlines()) == 1
    assert not out.exists()
