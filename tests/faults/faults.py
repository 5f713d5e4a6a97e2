"""The faults, each injected for real into a driver's study while one stage of it runs."""

import contextlib
import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.graph import Node
from tests.faults.study import Study, wait


@dataclass
class Scene:
    """A study whose driver runs, and the stage that is under attack."""

    study: Study
    driver: "subprocess.Popen[bytes]"
    node: Node

    @property
    def work(self) -> Path:
        return self.study.work(self.node)

    def leader(self) -> psutil.Process:
        """What the trial started: the job itself, or accelerate's launcher."""
        file = self.work / "process.json"
        return psutil.Process(int(json.loads(wait("the trial names its process", lambda: _text(file), self.driver))["pid"]))

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by their rank."""
        if self.node.processes == 1:
            return [self.leader()]
        found = [p for p in self.leader().children(recursive=True) if "RANK" in p.environ() and "-c" not in p.cmdline()]
        return sorted(found, key=lambda p: int(p.environ()["RANK"]))

    def named(self, name: str) -> psutil.Process:
        """A process of the study's own Ray."""
        return next(p for p in self.study.processes() if Path((p.cmdline() or [""])[0]).name == name)


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


# --- moments: the stage under attack runs, and has come so far -----------------------------------------------------------------


def at_work(scene: Scene) -> None:
    """Its first process has taken the lock of its work folder."""
    wait("the stage is at work", lambda: "process" in _text(scene.work / ".lock"), scene.driver)


def before_checkpoint(scene: Scene) -> None:
    wait("a step is done", lambda: '"step"' in _text(scene.work / "metrics.jsonl"), scene.driver)
    assert not checkpoints(scene)


def after_checkpoint(scene: Scene) -> None:
    wait("two checkpoints lie there", lambda: len(checkpoints(scene)) > 1, scene.driver)


def checkpoints(scene: Scene) -> list[Path]:
    return sorted((scene.work / "checkpoint").glob("[0-9]*"))


# --- faults ---------------------------------------------------------------------------------------------------------------------


def kill_rank(scene: Scene) -> None:
    scene.ranks()[-1].kill()


def kill_launcher(scene: Scene) -> None:
    scene.leader().kill()


def kill_worker(scene: Scene) -> None:
    """The actor of the Tune trial."""
    parent = scene.leader().parent()
    assert parent is not None and parent.pid != scene.driver.pid
    parent.kill()


def kill_raylet(scene: Scene) -> None:
    """The one that the trial runs under, the study's own or a joined cluster's."""
    next(p for p in scene.leader().parents() if p.name() == "raylet").kill()


def kill_head(scene: Scene) -> None:
    scene.named("gcs_server").kill()


def kill_driver(scene: Scene) -> None:
    scene.driver.kill()


def terminate_everything(scene: Scene) -> None:
    for process in scene.study.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()


def terminate_driver(scene: Scene) -> None:
    scene.driver.terminate()


def interrupt_driver(scene: Scene) -> None:
    scene.driver.send_signal(signal.SIGINT)


def stop_rank(scene: Scene) -> None:
    """It stands still, and is not gone."""
    scene.ranks()[-1].suspend()


def second_driver(scene: Scene) -> None:
    second = scene.study.start()
    assert second.wait(120) == 2, "the second driver is refused"
    last = scene.study.said().strip().split("\n")[-1]
    assert "another `grscale run` works here (process" in last, last


def _damage(scene: Scene, how: str, newest: int) -> None:
    """Stops the study, which saves, and damages its newest checkpoints."""
    scene.driver.terminate()
    scene.driver.wait(120)
    found = checkpoints(scene)
    assert len(found) == 2
    for folder in found[-newest:]:
        with (folder / "model.safetensors").open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if how == "truncate":
                file.truncate(size // 2)
            else:
                file.seek(size // 2)
                byte = file.read(1)[0]
                file.seek(size // 2)
                file.write(bytes([byte ^ 1]))


def truncate_newest(scene: Scene) -> None:
    _damage(scene, "truncate", 1)


def flip_newest(scene: Scene) -> None:
    _damage(scene, "flip", 1)


def damage_every(scene: Scene) -> None:
    _damage(scene, "flip", 2)


def fill_disk(scene: Scene) -> None:
    fill(scene.study.out)


def nothing(scene: Scene) -> None:
    """For what is wrong from the start."""


# --- small disks ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own of ``size`` bytes; RuntimeError where none can be mounted (needs root)."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode != 0:
        raise RuntimeError(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Writes FOLDER/.filler until not one byte more goes onto the disk."""
    with (folder / ".filler").open("ab", buffering=0) as file:
        for block in (1 << 20, 4096, 1):
            with contextlib.suppress(_Full):
                while True:
                    _write(file.fileno(), bytes(block))


class _Full(Exception):  # noqa: N818
    """No space is left."""


def _write(descriptor: int, block: bytes) -> None:
    try:
        os.write(descriptor, block)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _Full from None


def free(folder: Path) -> None:
    (folder / ".filler").unlink()
