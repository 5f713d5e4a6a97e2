"""Starting a job in each of the four ways, by the command and the environment that a study would start it with."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jobs.launcher import command, environment
from tests.conftest import ROOT, Finished, Jobs

SIZE = {"layers": 1, "d_model": 32, "heads": 2, "d_kv": 16, "d_ff": 64}


def training(size: Mapping[str, int] = SIZE, dropout: float = 0.0, **optimizer: Any) -> dict[str, Any]:
    """A `train_sid` of a few steps, at a learning rate under which Adam does not blow rounding errors up."""
    given = {"steps": 6, "global_batch": 64, "lr": 0.0005, "validations": 3} | optimizer
    return {"size": dict(size), "dropout": dropout, "max_history": 10, "optimizer": given, "seed": 3}


def write(jobs: Jobs, stage: str, name: str, config: Mapping[str, Any], launch: Mapping[str, Any], **inputs: str) -> Path:
    path = jobs.write(stage, name, dict(config), **inputs)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"launch": {"threads": 1, **launch}}))
    return path


def begin(path: Path, **env: str) -> subprocess.Popen[bytes]:
    """Starts a run.yaml; what it says goes to a file beside it (a pipe that nobody reads would fill up and stop it)."""
    run = yaml.safe_load(path.read_text())
    environ = environment(run, 0) | {"HF_HUB_OFFLINE": "1"} | env
    with path.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command(run, "jobs", path), cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)


def said(path: Path) -> str:
    return path.with_suffix(".log").read_text(errors="replace")


def launch(
    jobs: Jobs,
    stage: str,
    name: str,
    config: Mapping[str, Any],
    how: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    **inputs: str,
) -> Finished:
    path = write(jobs, stage, name, config, how, **inputs)
    code = begin(path, **(env or {})).wait(timeout=400)
    assert code == 0, f"{name}: exit {code}\n{said(path)[-6000:]}"
    return Finished(jobs.folder, name, said(path))


def losses(run: Finished) -> dict[str, float]:
    """Of the steps at which it was validated, in training and in validation; logged are those at least."""
    measured = dict(run.facts["validations"])
    trained = {row["step"]: row["loss"] for row in run.rows if "loss" in row}
    return {f"val-{s}": v for s, v in measured.items()} | {str(s): trained[s] for s in measured if s in trained}
