"""A Tune trial: a class that owns the process group of one job after another. It knows nothing of models."""

import contextlib
import os
import platform
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune

from cluster.store import kill_group, last_line
from gr.files import write_json
from jobs.artifact import read_manifest
from jobs.launcher import command as command
from jobs.launcher import environment as environment
from jobs.lifeline import die_with_parent

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
LEASE = 20.0
"""Seconds without a call of step() after which a job is ended."""
BEAT = 1.0
"""Seconds after which step() returns even without news, so that a stop request gets through."""


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
    so there is nothing for Tune to save. A job whose driver has not asked after it for `LEASE` seconds is ended: the driver, or
    Ray's head, is gone, and another driver may be about to start the same job elsewhere.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.group: Group | None = None
        self.lock = threading.Lock()
        self.asked = time.monotonic()
        self.machine = ray.get_runtime_context().get_node_id()
        self.reset_config(config)
        threading.Thread(target=self._watch, daemon=True).start()

    def reset_config(self, config: dict[str, Any]) -> bool:
        self.cleanup()
        self.todo = list(zip(map(Path, config["runs"]), config["gpus"], strict=True))
        self.module = str(config["module"])
        return True

    def step(self) -> dict[str, Any]:
        """Waits for a new line of metrics, the end of a job, or a second; raises with the reason of a job that failed."""
        with self.lock:
            try:
                return self._step()
            finally:
                self.asked = time.monotonic()

    def _step(self) -> dict[str, Any]:
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
        return {"done": self.group is None and not self.todo, "last": last_line(metrics), "machine": self.machine}

    def _watch(self) -> None:
        while True:
            time.sleep(1.0)
            with self.lock:
                if self.group is not None and time.monotonic() - self.asked > LEASE:
                    self.group.stop()
                    os._exit(1)  # if the driver lives after all, it sees a trial that died, and tries it again

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the job's checkpoint lies in its work folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, likewise."""

    def cleanup(self) -> None:
        with self.lock:
            if self.group is not None:
                self.group.stop()
                self.group = None
