"""The fault matrix: which fault, at which moment, and what has to come of it."""

import contextlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.ray_cluster import reachable
from tests.cluster.test_ray_cluster import Cluster
from tests.faults import faults
from tests.faults.faults import Scene
from tests.faults.study import PATIENCE, Study, copy_of, kill_all, wait

ORPHANS = 30.0
"""Seconds that a process of the study may outlive its driver or, where the driver lives, the fault."""
CHECKPOINTS = {"GRSCALE_CHECKPOINT_SECONDS": "0.2"}
MOMENTS: dict[str, tuple[Callable[[Scene], None], dict[str, str]]] = {
    "at work": (faults.at_work, {}),
    "training, no checkpoint yet": (faults.before_checkpoint, {}),
    "training, after a checkpoint": (faults.after_checkpoint, CHECKPOINTS),
    "from the start": (faults.nothing, {}),
}
"""How to wait for a moment, and the environment that brings it about."""


@dataclass(frozen=True)
class Cell:
    """One fault at one moment. ``rung``: of the point under attack; ``code``: of the driver that met the fault.

    None for 1 or 130, whichever the driver learns of first: that it has to end, or that its Ray is gone. ``says``: a regular
    expression that the driver's output or the stage's log has to match; ``resumed``: whether the stage goes on from a checkpoint.
    """

    fault: str
    inject: Callable[[Scene], None]
    stage: str
    rung: str
    moment: str
    code: int | None
    says: str = ""
    resumed: bool = False
    env: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    disk: str | None = None
    """The folder of the study that is a small file system of its own."""
    joined: bool = False
    """Whether the study runs on a Ray cluster of three raylets, and not on its own."""

    @property
    def when(self) -> str:
        return f"`{self.stage}` {self.moment}"


@dataclass(frozen=True)
class Outcome:
    """``gone``: seconds until the last process of the study was gone; ``again``: the exit code of the same command after it,
    where the first one was not 0; ``wrong``: what should not be, empty where all is as it has to be."""

    code: int | None
    gone: float
    again: int | None
    wrong: str


def run_cell(base: Study, cell: Cell, folder: Path) -> Outcome:
    """Injects the fault into a copy of ``base`` and lets the same command complete the study."""
    with contextlib.ExitStack() as stack:
        if cell.disk is not None:
            size = 64 << 20 if cell.disk == "." else 1 << 20
            stack.enter_context(faults.small_disk(folder / "study" / cell.disk, size))
        study = copy_of(base, folder)
        node = study.node(cell.stage, cell.rung)
        study.cut_back(node)
        cluster = stack.enter_context(_cluster()) if cell.joined else None
        if cluster is not None:
            study.env, study.joined = dict(cluster.secrets), True
        stack.callback(kill_all, study)
        moment, env = MOMENTS[cell.moment]
        study.env |= env | cell.env
        driver = study.start(*cell.options, *(["--ray", cluster.address] if cluster else []))
        scene = Scene(study, driver, node)
        code, gone, wrong = None, 0.0, ""
        try:
            moment(scene)
            if cluster is not None and cell.inject is faults.kill_head:
                cluster.kill(cluster.head)
            else:
                cell.inject(scene)
            code = driver.wait(PATIENCE)
            gone = _gone(study)
        except (AssertionError, subprocess.TimeoutExpired, psutil.NoSuchProcess, StopIteration) as error:
            wrong = f"{type(error).__name__}: {error}"
        kill_all(study)
        if not wrong:
            wrong = _wrong(base, study, cell, scene, code)
        if cell.disk is not None:
            faults.free(study.out / cell.disk)
        study.env = dict(cell.env if cell.resumed else {})
        again = None if code == 0 else study.start().wait(PATIENCE)
        return Outcome(code, gone, again, wrong or _differs(base, study, scene, cell, again))


def _gone(study: Study) -> float:
    """Seconds until no process of the study is left; AssertionError after `ORPHANS`."""
    began = time.monotonic()
    while left := study.processes():
        if time.monotonic() - began > ORPHANS:
            raise AssertionError(f"left after {ORPHANS:.0f} s: {'; '.join(_words(process) for process in left)}")
        time.sleep(0.02)
    return time.monotonic() - began


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.pid} {' '.join(process.cmdline())}"
    return f"{process.pid}, gone by now"


def _wrong(base: Study, study: Study, cell: Cell, scene: Scene, code: int | None) -> str:
    said = study.said() + study.said(scene.node)
    if code not in ((1, 130) if cell.code is None else (cell.code,)):
        return f"exit code {code}, not {'1 or 130' if cell.code is None else cell.code}: {study.said()[-600:]}"
    if not re.search(cell.says, said):
        return f"nothing says {cell.says!r}: {said[-600:]}"
    if "Traceback" in study.said():
        return f"the driver ends in a traceback: {study.said()[-2000:]}"
    for row, values in study.rows().items():
        if base.rows().get(row, values) != values:
            return f"row {row} differs"
    return ""


def _differs(base: Study, study: Study, scene: Scene, cell: Cell, again: int | None) -> str:
    if again:
        return f"the same command ends with {again}: {study.said()[-600:]}"
    if study.rows() != base.rows():
        rows, undisturbed = study.rows(), base.rows()
        if rows.keys() != undisturbed.keys():
            return f"rows {sorted(rows.keys() ^ undisturbed.keys())} are missing or new"
        return f"metrics differ: {[(k, c) for k in rows for c in rows[k] if rows[k][c] != undisturbed[k][c]]}"
    if study.files(scene.node) != base.files(scene.node):
        return f"files of {scene.node.key} differ"
    if not (study.out / "report" / "index.html").is_file():
        return "no report"
    metrics = scene.work / "metrics.jsonl"
    if cell.resumed and not (metrics.is_file() and '"resumed"' in metrics.read_text()):
        return "it did not go on from its checkpoint"
    return ""


@contextlib.contextmanager
def _cluster() -> Iterator[Cluster]:
    """A head without cores and two raylets."""
    folder = Path(tempfile.mkdtemp(prefix="gr", dir="/tmp"))  # the paths of Ray's sockets have to be short
    cluster = Cluster(folder)
    try:
        wait("the head listens", lambda: reachable(cluster.address))
        cluster.add()
        cluster.add()
        yield cluster
    finally:
        for part in cluster.parts:
            cluster.kill(part)
        cluster.log.close()
        shutil.rmtree(folder, ignore_errors=True)


EARLY = ("quantize", "one", "at work")
FIRST = ("training, no checkpoint yet",)
TRAINING = "training, after a checkpoint"
SIGNAL9 = r"killed by signal 9 \(SIGKILL\)"
RANK_DIED = r"failed: .* train_sid: "

CELLS = [
    Cell("kill -9 of the job", faults.kill_rank, *EARLY, 1, SIGNAL9),
    Cell("kill -9 of a rank (of two)", faults.kill_rank, "train_sid", "two", FIRST[0], 1, RANK_DIED),
    Cell("kill -9 of a rank (of two)", faults.kill_rank, "train_sid", "two", TRAINING, 1, RANK_DIED, resumed=True),
    Cell("kill -9 of the job", faults.kill_rank, "train_llm", "llm", TRAINING, 1, SIGNAL9, resumed=True),
    Cell("kill -9 of the job", faults.kill_rank, "evaluate_sid", "one", "at work", 1, SIGNAL9),
    Cell("kill -9 of accelerate's launcher", faults.kill_launcher, "train_sid", "two", FIRST[0], 1, SIGNAL9),
    Cell("kill -9 of accelerate's launcher", faults.kill_launcher, "train_sid", "two", TRAINING, 1, SIGNAL9, resumed=True),
    Cell("kill -9 of the Tune worker", faults.kill_worker, *EARLY, 0),
    Cell("kill -9 of the Tune worker", faults.kill_worker, "train_sid", "two", FIRST[0], 0),
    Cell("kill -9 of the Tune worker", faults.kill_worker, "train_sid", "two", TRAINING, 0, resumed=True),
    Cell("kill -9 of the Tune worker", faults.kill_worker, "evaluate_llm", "llm", "at work", 0),
    Cell("kill -9 of the raylet", faults.kill_raylet, "train_sid", "one", TRAINING, 1, "go on", resumed=True),
    Cell("kill -9 of a raylet of a cluster", faults.kill_raylet, "train_sid", "two", TRAINING, 0, resumed=True, joined=True),
    Cell("kill -9 of Ray's head", faults.kill_head, "train_sid", "one", TRAINING, 1, "go on", resumed=True),
    # The job may end its training before its lease does: whether the next run goes on from a checkpoint is open.
    Cell("kill -9 of a cluster's head", faults.kill_head, "train_sid", "one", TRAINING, 1, "head at .* is gone", joined=True),
    Cell("kill -9 of the driver", faults.kill_driver, *EARLY, -9),
    Cell("kill -9 of the driver", faults.kill_driver, "train_sid", "one", FIRST[0], -9),
    Cell("kill -9 of the driver", faults.kill_driver, "train_sid", "two", TRAINING, -9, resumed=True),
    Cell("kill -9 of the driver", faults.kill_driver, "evaluate_llm", "llm", "at work", -9),
    Cell("SIGTERM to everything", faults.terminate_everything, *EARLY, None),
    Cell("SIGTERM to everything", faults.terminate_everything, "train_llm", "llm", FIRST[0], None),
    Cell("SIGTERM to everything", faults.terminate_everything, "train_sid", "two", TRAINING, None, resumed=True),
    Cell("SIGTERM to everything", faults.terminate_everything, "evaluate_sid", "two", "at work", None),
    Cell("SIGTERM to the driver", faults.terminate_driver, "train_sid", "two", FIRST[0], 130, "go on", resumed=True),
    Cell("Ctrl-C", faults.interrupt_driver, "train_llm", "llm", FIRST[0], 130, "go on", resumed=True),
    Cell("a second driver", faults.second_driver, "train_sid", "one", FIRST[0], 0, "another `grscale run` works here"),
    Cell("newest checkpoint cut in half", faults.truncate_newest, "train_sid", "two", TRAINING, 130, resumed=True),
    Cell("newest checkpoint with a flipped bit", faults.flip_newest, "train_llm", "llm", TRAINING, 130, resumed=True),
    Cell("every checkpoint with a flipped bit", faults.damage_every, "train_sid", "one", TRAINING, 130),
    Cell("disk full", faults.fill_disk, *EARLY, 1, "the disk is full", disk="."),
    Cell("disk full", faults.fill_disk, "train_sid", "two", TRAINING, 1, "the disk is full", resumed=True, disk="."),
    Cell("disk full", faults.fill_disk, "evaluate_llm", "llm", "at work", 1, "the disk is full", disk="."),
    Cell("disk full for the metrics row", lambda scene: faults.fill(scene.study.out / "metrics"), "evaluate_sid", "one",
         "at work", 1, "the disk is full|No space left", disk="metrics"),
    Cell("NaN loss", faults.nothing, "train_sid", "one", "from the start", 1, r"loss is (nan|inf)",
         options=("--set", "sid.train.optimizer.lr=1e30")),
    Cell("a rank stands still", faults.stop_rank, "train_sid", "two", TRAINING, 1, "hangs: step", resumed=True,
         env={"GRSCALE_HANG_SECONDS": "5"}),
]  # fmt: skip
