"""A Tune trial: a class that owns the process group of one job after another. It knows nothing of models."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ray import tune

from cluster.store import kill_group, last_line
from gr.files import write_json
from jobs.artifact import read_manifest
from jobs.lifeline import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
BEAT = 1.0
"""Seconds after which step() returns even without news, so that a stop request gets through."""


def command(run: Mapping[str, Any], module: str, path: Path) -> list[str]:
    """What a person would type for this run.yaml."""
    job = ["-m", f"{module}.{run['stage']}", str(path)]
    processes = run["launch"]["processes"]
    if processes == 1:
        return [sys.executable, *job]
    # --multi_gpu also on CPU, with ACCELERATE_USE_CPU: `--cpu --num_processes n` would start one process.
    launcher = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *launcher, *job]


def environment(run: Mapping[str, Any], gpus: int) -> dict[str, str]:
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = str(run["launch"]["threads"])
    env["TOKENIZERS_PARALLELISM"] = "false"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["GRSCALE_TRIAL"] = "1"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env.pop("ACCELERATE_USE_CPU", None)
    env.pop("RAY_AUTH_TOKEN", None)
    if gpus == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""  # or it would use a GPU that Ray has given to another stage
        if run["launch"]["processes"] > 1:
            env["ACCELERATE_USE_CPU"] = "true"
    return env


class Group:
    """One job's process group, its log and its end."""

    def __init__(self, path: Path, module: str, gpus: int) -> None:
        self.run: dict[str, Any] = yaml.safe_load(path.read_text())
        self.work = path.parent
        (self.work / "failure.json").unlink(missing_ok=True)
        with (self.work / "log.txt").open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command(self.run, module, path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.run, gpus),
                start_new_session=True,
                preexec_fn=die_with_parent,  # also of SIGKILL, and before the job can set this for itself
            )
        write_json(self.work / "process.json", {"pid": self.process.pid, "host": platform.node(), "started": time.time()})

    def reason(self) -> str | None:
        """None when the finished process did its work, else why not; a process that said nothing gets its failure.json here."""
        code = self.process.wait()
        (self.work / "process.json").unlink(missing_ok=True)
        finished = read_manifest(self.work / self.run["out"]) is not None
        if code == 0 and finished:
            return None
        file = self.work / "failure.json"
        if not file.is_file():
            if code < 0:
                reason = f"killed by signal {-code} ({signal.Signals(-code).name})"
            elif code == 0:
                reason = "exited with code 0 and left no artifact"
            else:
                reason = f"exited with code {code}: {last_words(self.work / 'log.txt')}"
            write_json(file, {"reason": reason})
        return str(yaml.safe_load(file.read_text())["reason"])

    def stop(self) -> None:
        """SIGTERM to the whole group, then SIGKILL to what is left of it."""
        kill_group(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        kill_group(self.process.pid, signal.SIGKILL)
        self.process.wait()
        (self.work / "process.json").unlink(missing_ok=True)


def last_words(log: Path) -> str:
    """What a program said last before it died: its last line that begins with ``error:``, else the last one with words in it.

    torch's launcher ends its own report with a rule, and a table of ranks before that.
    """
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n--- ")[-1].split("\n")]
    said = [line for line in lines if any(c.isalpha() for c in line)]
    errors = [line.removeprefix("error:").strip() for line in said if line.startswith("error:")]
    return (errors or said or ["it said nothing"])[-1]


class Trial(tune.Trainable):  # type: ignore[misc]
    """Runs the run.yaml files of ``config["runs"]`` one after the other.

    ``config``: ``runs`` (paths), ``module`` (package of the jobs), ``gpus`` (per run). Checkpoints live in the run's own folder,
    so there is nothing for Tune to save.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.group: Group | None = None
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        self.cleanup()
        self.todo = list(zip(map(Path, config["runs"]), config["gpus"], strict=True))
        self.module = str(config["module"])
        return True

    def step(self) -> dict[str, Any]:
        """Waits for a new line of metrics, the end of a job, or a second; raises with the reason of a job that failed."""
        if self.group is None:
            path, gpus = self.todo.pop(0)
            self.group = Group(path, self.module, gpus)
        metrics = self.group.work / "metrics.jsonl"
        before = last_line(metrics)
        until = time.monotonic() + BEAT
        while time.monotonic() < until and self.group.process.poll() is None and last_line(metrics) == before:
            time.sleep(0.05)
        if self.group.process.poll() is not None:
            reason = self.group.reason()
            key = self.group.work.name
            self.group = None
            if reason is not None:
                raise RuntimeError(f"{key}: {reason}")
        return {"done": self.group is None and not self.todo, "last": last_line(metrics)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the job's checkpoint lies in its work folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, likewise."""

    def cleanup(self) -> None:
        if self.group is not None:
            self.group.stop()
            self.group = None
