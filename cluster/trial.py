"""A Tune trial: a class that owns the process group of one job after another. It knows nothing of models."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cluster.group import Group
from cluster.store import last_line

LEASE = 20.0
"""Seconds without a call of step() after which a job is asked to end; `cluster.group.grace` seconds later it is killed."""
BEAT = 1.0
"""Seconds after which step() returns even without news, so that a stop request gets through."""


class Trial(tune.Trainable):  # type: ignore[misc]
    """Runs the run.yaml files of ``config["runs"]`` one after the other.

    ``config``: ``runs`` (paths), ``module`` (package of the jobs), ``gpus`` (per run), ``trial`` (in a sweep of learning rates:
    the identity of the job whose validations are reported). Checkpoints live in the run's own folder, so there is nothing
    for Tune to save. A job whose driver has not asked after it for `LEASE` seconds is ended: the driver, or Ray's head, is gone,
    and another driver may be about to start the same job elsewhere.
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
        self.trial, self.validated = config.get("trial"), 0
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
        metrics, id = self.group.work / "metrics.jsonl", self.group.run["id"]
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
        last = last_line(metrics)
        found = {"done": self.group is None and not self.todo, "last": last, "machine": self.machine}
        return found | (self._validation(last) if id == self.trial else {})

    def _validation(self, last: dict[str, Any]) -> dict[str, Any]:
        """``train_step`` and ``loss_val`` of a new validation, once: what a scheduler of Tune compares trials by."""
        if "loss_val" not in last or last["step"] <= self.validated:
            return {}
        self.validated = last["step"]
        return {"train_step": last["step"], "loss_val": last["loss_val"]}

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
