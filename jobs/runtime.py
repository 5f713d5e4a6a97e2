"""What every job shares: reading run.yaml, dying with its launcher, writing the artifact whole, exit codes.

No torch is imported here, so that a stage without it starts in a moment.
"""

import errno
import fcntl
import json
import logging
import os
import platform
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NoReturn, TextIO, TypeVar

import yaml
from pydantic import ValidationError

from gr.errors import UserError
from gr.files import read_object, whole_folder, write_json
from jobs.artifact import read_manifest, write_manifest
from jobs.config import DIVISIBLE, INPUTS, PARALLEL, STAGES, Run
from jobs.options import Config, Launch
from jobs.stop import EXIT, SIGNALS

C = TypeVar("C", bound=Config)
LOCK_SECONDS = 3.0
"""How long a work folder may stay another process's: one that was just killed needs a moment to be gone."""
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file would be larger than allowed",
}
LEAST_FREE = 4096
"""Bytes: where no block is left, a library's error is taken for one of the full disk, whatever it says."""
logger = logging.getLogger(__name__)


class RunFailed(Exception):  # noqa: N818 -- what it says happened
    """The run failed for a reason that can be stated, such as a loss that is not a number."""


class Context(Generic[C]):
    """One run of one stage: its configuration, its inputs, and where it writes."""

    def __init__(self, run: Run, config: C, base: Path) -> None:
        self.run, self.config = run, config
        self.base = base
        self.work = base / run.work
        self.out = base / run.out
        """The finished artifact's place; while the body runs, the folder aside that will become it."""
        self.facts: dict[str, Any] = {}
        self.rank = int(os.environ.get("RANK", "0"))
        self.started = time.time()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def input(self, name: str) -> Path:
        """The folder of an input; UserError when the run has none of that name, it is not there, or another stage made it."""
        if name not in self.run.inputs:
            raise UserError(f"run.yaml: inputs.{name} is missing; stage {self.run.stage} needs it")
        folder = self.base / self.run.inputs[name]
        if not folder.is_dir():
            raise UserError(f"run.yaml: inputs.{name}: {folder} is not there; its stage has not finished")
        manifest, maker = read_manifest(folder), INPUTS[self.run.stage][name]
        if manifest is not None and manifest["stage"] != maker:
            raise UserError(f"run.yaml: inputs.{name}: {folder} is of stage {manifest['stage']}; it has to be one of {maker}")
        return folder

    def input_file(self, name: str, file: str) -> Path:
        """A file of an input; UserError where the folder lacks it."""
        path = self.input(name) / file
        if not path.is_file():
            raise UserError(f"run.yaml: inputs.{name}: {path.parent} has no {file}; {INPUTS[self.run.stage][name]} writes one")
        return path

    def trained_config(self) -> dict[str, Any]:
        """The configuration that the input ``model`` was trained with.

        UserError for a folder that no stage made, and where an input that this run shares with the training is another one.
        """
        folder = self.input("model")
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"run.yaml: inputs.model: {folder} is no artifact of a stage (no artifact.json)")
        for name, mine in self.signature()["inputs"].items():
            if (its := manifest["inputs"].get(name, mine)) != mine:
                raise UserError(f"run.yaml: inputs.{name} is {mine}, but inputs.model was trained with {its}; give it that one")
        return dict(manifest["config"])

    def model(self, name: str) -> str:
        """A model of `config`: a folder is relative to that of run.yaml, as all paths are; anything else is a hub's name."""
        folder = self.base / Path(name).expanduser()
        return str(folder) if folder.is_dir() else name

    def signature(self) -> dict[str, Any]:
        """What makes the result: configuration, inputs' identities, and what counts of `launch`."""
        config = self.config.model_dump(mode="json")
        config.get("optimizer", {}).pop("lr_choice", None)  # words for the report
        return {
            "config": config,
            "inputs": {name: _identity(self.base / folder) for name, folder in self.run.inputs.items()},
            "launch": self.run.launch.identity(),
        }

    def differs(self, other: dict[str, Any], placed_alike: bool = True) -> str:
        """In what ``other`` (a manifest, or a checkpoint's signature) is of another run than this one; empty when in nothing.

        Without ``placed_alike`` all that counts of `launch` is the precision.
        """
        mine = self.signature()
        config = json.loads(json.dumps(other["config"]))
        config.get("optimizer", {}).pop("lr_choice", None)
        if config != mine["config"]:
            keys = sorted(k for k in config.keys() | mine["config"].keys() if config.get(k) != mine["config"].get(k))
            return f"config.{keys[0]} was {config.get(keys[0])}, is {mine['config'].get(keys[0])}"
        if other["inputs"] != mine["inputs"]:
            return f"inputs were {other['inputs']}, are {mine['inputs']}"
        was = Launch.model_validate(other["launch"])
        launch = self.run.launch if placed_alike else was.model_copy(update={"precision": self.run.launch.precision})
        keys = sorted(k for k in Launch.model_fields if k != "threads" and getattr(was, k) != getattr(launch, k))
        return f"launch.{keys[0]} was {getattr(was, keys[0])}, is {getattr(launch, keys[0])}" if keys else ""

    def log(self, **row: Any) -> None:
        """Appends one line to metrics.jsonl (first process only); on a full disk the line is lost, and the log says so."""
        if self.is_main:
            try:
                with (self.work / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                logger.warning("%s: %s", self.work / "metrics.jsonl", error.strerror)


def peak_memory() -> int:
    """Bytes of main memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_run(path: Path) -> Run:
    """Reads and checks a run.yaml; UserError names the file and the key."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; usage: python -m jobs.<stage> run.yaml")
    try:
        return Run.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None


def main(stage: str, body: Callable[[Context[Any]], None]) -> NoReturn:
    """Runs ``body`` for the run.yaml named on the command line, and exits: 0 done, 2 the user's mistake, 1 failed.

    143 when it is asked to end by SIGTERM or SIGUSR1; while it trains, `jobs.trainer` catches them and saves first.
    """
    work: Path | None = None  # known once it is this process's own to write in
    for number in SIGNALS:  # so that what is half-written is removed
        signal.signal(number, lambda *_: sys.exit(EXIT))
    try:
        if len(sys.argv) != 2:
            raise UserError(f"usage: python -m jobs.{stage} run.yaml")
        path = Path(sys.argv[1]).resolve()
        context = _read_context(stage, path)
        if context.is_main:
            lock = _lock(context)  # noqa: F841 -- held as long as the process lives
            work = context.work
        finished = read_manifest(context.out)
        if finished is None:
            _run_body(context, body)
        elif difference := context.differs(finished):
            raise UserError(f"{path}: {context.out} holds the result of another run ({difference}); name another folder in out")
        if context.is_main:
            (context.work / "failure.json").unlink(missing_ok=True)
    except UserError as error:
        fail(work, str(error), 2)
    except RunFailed as error:
        fail(work, str(error), 1)
    except Exception as error:
        traceback.print_exc()
        fail(work, _reason(work, error), 1)
    sys.stdout.flush()
    sys.exit(0)


def _read_context(stage: str, path: Path) -> Context[Any]:
    """What the run.yaml says, checked as far as it can be without writing anything."""
    run = read_run(path)
    if run.stage != stage:
        raise UserError(f"{path}: stage is {run.stage!r}; this is jobs.{stage}")
    if run.launch.processes > 1 and stage not in PARALLEL:
        raise UserError(f"{path}: launch.processes is {run.launch.processes}; stage {stage} is done by one process")
    given = (("zero", run.launch.zero), ("accumulation", run.launch.accumulation - 1), ("graphs", run.launch.graphs))
    for key, value in given:
        if value and stage not in DIVISIBLE:
            raise UserError(f"{path}: launch.{key} is {getattr(run.launch, key)}; only {', '.join(sorted(DIVISIBLE))} have it")
    _check_processes(run, path)
    try:
        config = STAGES[stage].model_validate(run.config)
    except ValidationError as error:
        raise UserError(f"{path}: config: {_one_line(error)}") from None
    context: Context[Any] = Context(run, config, path.parent)
    for kept, words in ((context.base, "run.yaml itself"), (context.work, "work")):
        if kept.resolve().is_relative_to(context.out.resolve()):
            raise UserError(f"{path}: out: {context.out} would hold {words}; the artifact needs a folder of its own")
    return context


def _lock(context: Context[Any]) -> TextIO:
    """Makes the folders to write in and takes the lock of ``work``, which the kernel frees however this process ends.

    UserError when another process holds it, or a folder can't be written in.
    """
    for name, folder in (("work", context.work), ("out", context.out.parent)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.yaml: {name}: {folder} can't be made ({error.strerror}); name another folder") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"run.yaml: {name}: {folder} can't be written in; name another folder")
    file = (context.work / ".lock").open("a+")
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                file.seek(0)
                other = file.read() or "another process"
                raise UserError(f"{context.work}: {other} works here; wait for it or stop it") from None
            time.sleep(0.05)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def _run_body(context: Context[Any], body: Callable[[Context[Any]], None]) -> None:
    if not context.is_main:
        body(context)  # only the first process writes: the others compute beside it
        return
    (context.work / "failure.json").unlink(missing_ok=True)
    final = context.out
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(f"run.yaml: out: {final} is there and no finished artifact; name another folder, or remove that one")
    with whole_folder(final) as aside:
        context.out = aside
        body(context)
        run = context.run
        write_manifest(
            aside,
            stage=run.stage,
            id=run.id,
            config=context.config.model_dump(mode="json"),
            inputs=context.signature()["inputs"],
            launch=run.launch.model_dump(),
            started=context.started,
            facts=context.facts,
        )
    shutil.rmtree(context.work / "checkpoint", ignore_errors=True)  # the artifact is in place: nothing reads them any more
    (context.work / "accumulation.json").unlink(missing_ok=True)


def _identity(folder: Path) -> str:
    """Of an artifact its id; of a dataset folder from outside, which may be imported again, what is in it; else the path."""
    manifest = read_manifest(folder)
    if manifest:
        return str(manifest["id"])
    outside = folder / "manifest.json"
    fingerprint = read_object(outside).get("fingerprint") if outside.is_file() else None
    return f"dataset:{fingerprint}" if fingerprint else str(folder)


def _check_processes(run: Run, path: Path) -> None:
    """A launcher that was told too little starts one process, or several that do not know of each other (see docs)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != run.launch.processes:
        raise UserError(f"{path}: launch.processes is {run.launch.processes}, but {world} process(es) were started")


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return " ".join(str(error).split())


def no_room(folder: Path | None, error: Exception) -> str:
    """Why nothing more can be written in ``folder``, whichever library met it; empty where that is not what happened."""
    said = [words for code, words in FULL.items() if getattr(error, "errno", None) == code or os.strerror(code) in str(error)]
    if not said and folder is not None and folder.is_dir() and shutil.disk_usage(folder).free < LEAST_FREE:
        said = [FULL[errno.ENOSPC]]
    return said[0] if said else ""


def _reason(work: Path | None, error: Exception) -> str:
    """One line; of a full disk one that says so."""
    full = no_room(work, error)
    return f"{full}: {_one_line(error)}" if full else f"{type(error).__name__}: {_one_line(error)}"


def fail(work: Path | None, reason: str, code: int) -> NoReturn:
    """Says why on stderr and in failure.json, and exits without waiting for other processes that may hang in a collective."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    if work is not None and work.is_dir() and int(os.environ.get("RANK", "0")) == 0:
        try:
            write_json(work / "failure.json", {"reason": reason})
        except OSError as error:  # stderr has said why
            print(f"{work / 'failure.json'}: {error.strerror}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
