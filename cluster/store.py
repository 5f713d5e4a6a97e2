"""A study's folder: where everything of it lies on disk, and what the disk says about each stage.

Nothing here knows of Ray: the folder is the truth, and `run`, `status` and `logs` all read it.
"""

import copy
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil  # type: ignore[import-untyped]
import yaml

from cluster.graph import Node, Plan, Point
from cluster.identity import LENGTH
from cluster.rates import SweepTrial
from gr.errors import UserError
from gr.files import read_json, write_json
from jobs.artifact import read_manifest

State = Literal["done", "running", "failed", "waiting"]
_HALF = re.compile(rf"\.([0-9a-f]{{{LENGTH}}})\.")  # what gr.files.whole_folder writes in


@dataclass(frozen=True)
class Failure:
    """Why a point has no row. ``log``: the log of the stage that failed; ``ran``: False where none did, and one did not run."""

    point: str
    reason: str
    log: str
    ran: bool = True


@dataclass
class Stop:
    """Whether the user asked for the end. No `threading.Event`: Tune pickles what it is given."""

    asked: bool = False

    def __deepcopy__(self, memo: object) -> "Stop":
        return self


class Store:
    """The folder of one study."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def artifact(self, node: Node) -> Path:
        return self.folder / "artifacts" / node.stage / node.id

    def work(self, node: Node) -> Path:
        return self.folder / "work" / node.key

    def row(self, point: Point) -> Path:
        return self.folder / "metrics" / f"{point.run_id}.parquet"

    @property
    def widths(self) -> Path:
        """The table of evaluations with several beam widths."""
        return self.folder / "widths.parquet"

    def manifest(self, node: Node) -> dict[str, Any] | None:
        """The finished stage's manifest; None also for a damaged artifact, which is then built again."""
        folder = self.artifact(node)
        try:
            manifest = read_manifest(folder)
        except ValueError:
            return None
        if manifest is None or not all((folder / name).is_file() for name in manifest.get("files", ())):
            return None
        return manifest

    def done(self, node: Node) -> bool:
        return self.manifest(node) is not None

    def failure(self, node: Node) -> str | None:
        """The reason why the stage's last try failed, if it did."""
        file = self.work(node) / "failure.json"
        try:
            return str(read_json(file)["reason"]) if file.is_file() else None
        except (ValueError, KeyError):
            return "its failure.json is damaged"

    def state(self, node: Node) -> State:
        if self.done(node):
            return "done"
        if self.alive(node):
            return "running"
        return "failed" if self.failure(node) is not None else "waiting"

    def process(self, node: Node) -> dict[str, Any] | None:
        """What the trial wrote about the process group it started: pid, host; None when there is none."""
        try:
            return dict(read_json(self.work(node) / "process.json"))
        except FileNotFoundError:
            return None

    def alive(self, node: Node) -> bool:
        """Whether a process works on the stage; on another host the trial's own word is taken for it."""
        process = self.process(node)
        if process is None:
            return False
        if process["host"] != platform.node():
            return True
        try:
            started = psutil.Process(process["pid"])
            return started.status() != psutil.STATUS_ZOMBIE and str(self.work(node) / "run.yaml") in started.cmdline()
        except psutil.NoSuchProcess:
            return False

    def end_groups(self, plan: Plan) -> None:
        """Kills what a killed trial left on this machine, and forgets what is gone."""
        for node in plan.nodes.values():
            process = self.process(node)
            if process is not None and process["host"] == platform.node():
                if self.alive(node):
                    kill_group(process["pid"], signal.SIGKILL)
                (self.work(node) / "process.json").unlink(missing_ok=True)

    def last_metrics(self, node: Node) -> dict[str, Any]:
        """The last whole line of the stage's metrics.jsonl; empty when there is none."""
        return last_line(self.work(node) / "metrics.jsonl")

    def write_run(self, node: Node, plan: Plan) -> Path:
        """Writes the stage's run.yaml, with paths relative to it, and returns its path."""
        work = self.work(node)
        work.mkdir(parents=True, exist_ok=True)
        inputs = {
            name: os.path.relpath(self.artifact(plan.nodes[value]), work) if value in plan.nodes else value
            for name, value in node.inputs.items()
        }
        document = {
            "stage": node.stage,
            "id": node.id,
            "out": os.path.relpath(self.artifact(node), work),
            "work": ".",
            "inputs": inputs,
            "config": node.config,
            "launch": {"processes": node.processes, "threads": node.threads, **node.launch},
        }
        path = work / "run.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    def check_links(self) -> None:
        """UserError for a link in the folder, down to the files of a stage, that leads out of it: what is written or removed
        there would be somebody else's."""
        folders = [self.folder]
        for depth in range(4):
            entries = [entry for folder in folders if folder.is_dir() for entry in os.scandir(folder)]
            for entry in entries:
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(self.folder):
                    raise UserError(f"{entry.path}: a link out of the study's folder; put what it links to in its place")
            if depth < 3:
                folders = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]

    def prepare(self, plan: Plan, raw: dict[str, Any]) -> None:
        """Makes the folder, or takes up the one that is there; UserError when it holds another study.

        Rows of points that the plan no longer has are moved to metrics-old/, out of the report's sight.
        """
        old = self.folder / "plan.json"
        if old.is_file() and (name := _plan_document(old).get("study")) != plan.study.study:
            raise UserError(f"{self.folder}: holds study {name!r}, not {plan.study.study!r}; give another --out")
        with self._usable():
            for name in ("artifacts", "work", "metrics"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            _write_if_new(self.folder / "study.yaml", yaml.safe_dump(_absolute(raw), sort_keys=False))
            _write_if_new(old, json.dumps(plan.document(), indent=1) + "\n")
        present = {self.row(point).name for point in plan.points}
        for row in sorted((self.folder / "metrics").glob("*.parquet")):
            if row.name not in present:
                (self.folder / "metrics-old").mkdir(exist_ok=True)
                row.rename(self.folder / "metrics-old" / row.name)
        for row in sorted((self.folder / "metrics-old").glob("*.parquet")):
            if row.name in present and not (self.folder / "metrics" / row.name).exists():
                row.rename(self.folder / "metrics" / row.name)

    def sweep(self, plan: Plan) -> None:
        """Removes what killed jobs and drivers left half-written, and damaged artifacts; call it under the lock, when no job of
        this folder runs."""
        elsewhere = {node.id for node in plan.nodes.values() if self.alive(node)}  # on another host, by the trial's own word
        for path in (self.folder / "artifacts").glob("*/.*"):
            if (half := _HALF.match(path.name)) and half[1] not in elsewhere and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        for node in plan.nodes.values():
            if self.artifact(node).is_dir() and not self.done(node) and node.id not in elsewhere:
                shutil.rmtree(self.artifact(node))
        for path in (self.folder / "metrics").glob(".*.parquet.*"):
            path.unlink()

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """UserError where the folder can't be made or written in."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.folder}: no folder to write a study in ({error.strerror}); give another --out") from None

    def write_failures(self, failures: list[Failure]) -> None:
        """failures.json, for the report; removed when nothing failed."""
        file = self.folder / "failures.json"
        if failures:
            write_json(file, [vars(failure) for failure in failures])
        else:
            file.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a study runs, in a folder that is made where there is none; UserError for a second driver.

        The kernel frees it however the first one ends.
        """
        with self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.check_links()
            lock = (self.folder / ".lock").open("a+")
        with lock as file:
            if not _exclusive(file):
                file.seek(0)
                raise UserError(
                    f"{self.folder}: another `grscale run` works here ({file.read().strip()}); wait for it or stop it"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def locked(self) -> bool:
        """Whether a driver is at work here."""
        lock = self.folder / ".lock"
        if not lock.is_file():
            return False
        with lock.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: one who only asks keeps no other asker out
            except OSError:
                return True
        return False


def open_store(folder: Path) -> tuple[Store, Plan]:
    """A study's folder and the plan in it; UserError when it is none."""
    from cluster.study import load_study

    plan_file = folder / "plan.json"
    if not plan_file.is_file():
        raise UserError(f"{folder}: not a study's folder (no plan.json); `grscale run STUDY --out {folder}` makes one")
    document = _plan_document(plan_file)
    plan = Plan(load_study(folder / "study.yaml").study)
    try:
        plan.nodes = {node["id"]: Node(**node) for node in document["nodes"]}
        plan.points = [_point(**point) for point in document["points"]]
        trials = document.get("trials", [])  # of a folder from before there were sweeps
        plan.trials = [SweepTrial(**{**trial, "nodes": tuple(trial["nodes"])}) for trial in trials]
        plan.pending = dict(document.get("pending", {}))
    except (KeyError, TypeError):
        raise _damaged(plan_file) from None
    ids = [word for node in plan.nodes.values() for word in (node.id, node.stage)]
    for name in [*ids, *(point.run_id for point in plan.points), *(trial.run_id for trial in plan.trials)]:
        if "/" in str(name) or str(name).startswith("."):
            raise UserError(f"{plan_file}: {name!r} is no name of a stage or a point; the folder can't be trusted")
    store = Store(folder)
    store.check_links()
    return store, plan


def _point(nodes: list[str], widths: Sequence[str] = (), **rest: Any) -> Point:
    """From JSON; a folder from before there were widths has none."""
    return Point(nodes=tuple(nodes), widths=tuple(widths), **rest)


def _plan_document(file: Path) -> dict[str, Any]:
    """plan.json; UserError when it is none."""
    try:
        document = read_json(file)
    except ValueError:
        raise _damaged(file) from None
    if not isinstance(document, dict):
        raise _damaged(file)
    return document


def _damaged(file: Path) -> UserError:
    return UserError(f"{file}: damaged; remove it, and the same `grscale run` writes it again and goes on")


def _exclusive(file: IO[str]) -> bool:
    """Locks the file, unless another driver holds it; one who only asks (`Store.locked`) is gone in a moment."""
    for _ in range(5):
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False


def kill_group(pid: int, signum: int) -> None:
    """Signals a process group, unless it is gone."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signum)


def last_line(file: Path) -> dict[str, Any]:
    """The last whole JSON line of a file that is being appended to; empty when there is none."""
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8192))
        lines = stream.read().split(b"\n")[:-1]  # what follows the last newline is not whole yet
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # torn by a kill; the line before it is good
        if isinstance(found, dict):
            return found
    return {}


def _absolute(raw: dict[str, Any]) -> dict[str, Any]:
    """The study with the paths of its data sets and models made absolute, so that its copy means the same from anywhere."""
    found = copy.deepcopy(raw)
    for spec in found["datasets"].values():
        if spec.get("path"):
            spec["path"] = str(Path(spec["path"]).expanduser().resolve())
    encoders, rungs = (found.get("sid") or {}).get("encoders") or {}, (found.get("llm") or {}).get("ladder") or []
    for spec in (*encoders.values(), *rungs):
        if spec.get("model") and Path(spec["model"]).expanduser().is_dir():  # else the name of one on the hub
            spec["model"] = str(Path(spec["model"]).expanduser().resolve())
    return found


def _write_if_new(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(text)
        aside.replace(path)
