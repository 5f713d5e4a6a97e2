"""Checkpoints of a training run: written aside and renamed whole, checked by checksum when read, the last two kept."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from gr.errors import UserError
from gr.files import read_json, sha256, write_json
from jobs.runtime import Context

KEPT = 2
logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run. What is kept beside accelerate's own state is ``progress``, a JSON document, and the best
    weights so far."""

    def __init__(self, context: Context[Any], accelerator: Accelerator) -> None:
        self.context, self.accelerator = context, accelerator
        self.folder = context.work / "checkpoint"

    def save(self, step: int, progress: dict[str, Any], best: dict[str, torch.Tensor]) -> None:
        """All processes call this at the same step."""
        aside = self.folder / f".aside-{step:09d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if best:
                save_file(best, aside / "best.safetensors")
            files = {str(p.relative_to(aside)): sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
            signature = self.context.signature()
            write_json(aside / "checkpoint.json", {"step": step, "run": signature, "progress": progress, "files": files})
            final = self.folder / f"{step:09d}"
            shutil.rmtree(final, ignore_errors=True)
            aside.replace(final)
            for old in self._steps()[:-KEPT]:
                shutil.rmtree(old)

    def load(self) -> tuple[int, dict[str, Any], dict[str, torch.Tensor]] | None:
        """Restores the newest whole checkpoint into what the accelerator prepared; None where there is none.

        A damaged one is passed over, and the log says so. UserError for one of another configuration, inputs or number of
        processes.
        """
        for folder in reversed(self._steps()):
            damage = _damage(folder)
            if damage:
                logger.warning("checkpoint %s is damaged (%s): going back to the one before", folder.name, damage)
                continue
            manifest = read_json(folder / "checkpoint.json")
            if difference := self.context.differs(manifest["run"]):
                raise UserError(f"{folder}: a checkpoint of another run ({difference}); remove it or name another folder in work")
            self.accelerator.load_state(str(folder))
            best = folder / "best.safetensors"
            return int(manifest["step"]), manifest["progress"], load_file(best) if best.is_file() else {}
        return None

    def _steps(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("[0-9]*") if p.is_dir()) if self.folder.is_dir() else []


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words; empty when nothing is."""
    file = folder / "checkpoint.json"
    try:
        files = read_json(file)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"checkpoint.json: {error}"
    for name, checksum in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != checksum:
            return f"{name} has another checksum"
    return ""
