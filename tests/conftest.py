"""What the tests share: the folder of real data where it is, a small planted split, and starting jobs as a person would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`../shared/data` beside the checkout; the test is skipped where it is not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


class Jobs:
    """Runs stages by `python -m jobs.<stage> run.yaml` (or accelerate's launcher) in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, stage: str, name: str, config: dict[str, Any], processes: int = 1, **inputs: str) -> Path:
        """Writes NAME.yaml; inputs are names of earlier runs."""
        run = {
            "stage": stage,
            "id": name,
            "out": f"artifacts/{name}",
            "work": f"work/{name}",
            "inputs": {k: f"artifacts/{v}" for k, v in inputs.items()},
            "config": config,
            "launch": {"processes": processes, "threads": 1},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    def command(self, stage: str, path: Path, processes: int = 1) -> list[str]:
        if processes == 1:
            return [sys.executable, "-m", f"jobs.{stage}", str(path)]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        return [*launcher, "--num_processes", str(processes), "-m", f"jobs.{stage}", str(path)]

    def environment(self) -> dict[str, str]:
        return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def run(
        self, stage: str, name: str, config: dict[str, Any], processes: int = 1, expect: int = 0, **inputs: str
    ) -> "Finished":
        path = self.write(stage, name, config, processes, **inputs)
        done = subprocess.run(
            self.command(stage, path, processes), cwd=ROOT, env=self.environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == expect, f"{name}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return Finished(self.folder, name, done.stderr)


class Finished:
    """What a run left."""

    def __init__(self, folder: Path, name: str, stderr: str) -> None:
        self.out, self.work, self.stderr = folder / "artifacts" / name, folder / "work" / name, stderr

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.out / "artifact.json").read_text())["facts"]
        return facts

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.work / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


WORLD = {"users": 300, "items": 80, "topics": 8, "communities": 6, "subtopics": 3, "mean_length": 10}


@pytest.fixture(scope="session")
def split(jobs: Jobs) -> str:
    """A small planted world, split: the names of its runs are `planted` and `split`."""
    jobs.run("plant", "planted", {"world": WORLD})
    jobs.run("prepare", "split", {}, dataset="planted")
    return "split"
