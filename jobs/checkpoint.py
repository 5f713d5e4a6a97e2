"""Checkpoints of a training run: written aside and renamed whole, checked by checksum when read, the last two kept.

Whole tensors by parameter name, as safetensors, however many processes share the model and in whatever way. So a checkpoint
resumes on any number of processes and under any stage of ZeRO, and no conversion is ever needed.
"""

import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gr.errors import UserError
from gr.files import read_json, sha256, write_json
from jobs.parallel import Parallel, Tensors
from jobs.runtime import Context

KEPT = 2
LEAST_SECONDS = 60.0
"""Between two checkpoints, at least."""
FACTOR = 20
"""And at least this many times what the slowest one took: so they cost less than 5% of the time."""
WEIGHTS, MOMENTS, BEST = "model.safetensors", "adam.safetensors", "best.safetensors"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: the state after ``step`` steps."""

    folder: Path
    step: int
    progress: dict[str, Any]

    def weights(self) -> Tensors:
        return load_file(self.folder / WEIGHTS)

    def moments(self) -> Tensors:
        return load_file(self.folder / MOMENTS)

    def best(self) -> Tensors:
        return load_file(self.folder / BEST) if (self.folder / BEST).is_file() else {}


class Checkpoints:
    """The checkpoints of a run. GRSCALE_CHECKPOINT_SECONDS sets the seconds between two, whatever they cost."""

    def __init__(self, context: Context[Any], accelerator: Accelerator) -> None:
        self._context, self._main = context, accelerator.is_main_process
        self._folder = context.work / "checkpoint"
        self._saved, self._slowest = time.monotonic(), 0.0
        self._fixed = os.environ.get("GRSCALE_CHECKPOINT_SECONDS")

    def due(self) -> bool:
        """Whether it is time for the next one, by this process's clock."""
        interval = max(LEAST_SECONDS, FACTOR * self._slowest) if self._fixed is None else float(self._fixed)
        return time.monotonic() - self._saved > interval

    def save(self, step: int, progress: dict[str, Any], parallel: Parallel, best: Tensors) -> float:
        """All processes call this at the same step, the first one writes; returns the seconds it took.

        Where it can't be written, as on a full disk, the log says so, the older ones stay, and the training goes on.
        """
        began = time.monotonic()
        weights, moments = parallel.weights(), parallel.moments()
        if self._main:
            aside = self._folder / f".aside-{step:09d}"
            try:
                self._write(aside, step, progress, weights, moments, best)
            except (OSError, SafetensorError) as error:
                logger.warning("checkpoint of step %d could not be written (%s): the training goes on without it", step, error)
                shutil.rmtree(aside, ignore_errors=True)
        self._saved = time.monotonic()
        self._slowest = max(self._slowest, self._saved - began)
        return self._saved - began

    def _write(self, aside: Path, step: int, progress: dict[str, Any], weights: Tensors, moments: Tensors, best: Tensors) -> None:
        for left in self._folder.glob(".aside-*"):  # of a process that was killed
            shutil.rmtree(left)
        aside.mkdir(parents=True)
        save_file(weights, aside / WEIGHTS)
        save_file(moments, aside / MOMENTS)
        if best:
            save_file(best, aside / BEST)
        files = {p.name: sha256(p) for p in sorted(aside.iterdir())}
        signature = self._context.signature()
        write_json(aside / "checkpoint.json", {"step": step, "run": signature, "progress": progress, "files": files})
        final = self._folder / f"{step:09d}"
        shutil.rmtree(final, ignore_errors=True)
        aside.replace(final)
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(old)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None where there is none.

        A damaged one is passed over, and the log says so. UserError for one of another configuration or inputs. The number of
        processes and what else `launch` says may have changed: then the run ends only nearly like an undisturbed one.
        """
        for folder in reversed(self._steps()):
            damage = _damage(folder)
            if damage:
                logger.warning("checkpoint %s is damaged (%s): going back to the one before", folder.name, damage)
                continue
            manifest = read_json(folder / "checkpoint.json")
            if difference := self._context.differs(manifest["run"], placed_alike=False):
                raise UserError(f"{folder}: a checkpoint of another run ({difference}); remove it or name another folder in work")
            if difference := self._context.differs(manifest["run"]):
                logger.warning("checkpoint %s goes on otherwise than it was begun: %s", folder.name, difference)
            return Checkpoint(folder, int(manifest["step"]), manifest["progress"])
        return None

    def _steps(self) -> list[Path]:
        return sorted(p for p in self._folder.glob("[0-9]*") if p.is_dir()) if self._folder.is_dir() else []


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words; empty when nothing is."""
    file = folder / "checkpoint.json"
    try:
        files = read_json(file)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"checkpoint.json: {error}"
    for name in (WEIGHTS, MOMENTS):
        if name not in files:
            return f"it has no {name}"
    for name, checksum in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != checksum:
            return f"{name} has another checksum"
    return ""
