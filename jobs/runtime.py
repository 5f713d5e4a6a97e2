"""What every job shares: reading run.yaml, dying with its launcher, writing the artifact whole, exit codes.

No torch is imported here, so that a stage without it starts in a moment.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import yaml
from pydantic import ValidationError

from gr.errors import UserError
from gr.files import whole_folder, write_json
from jobs.artifact import read_manifest, write_manifest
from jobs.config import STAGES, Config, Run

C = TypeVar("C", bound=Config)


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

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def input(self, name: str) -> Path:
        """The folder of an input; UserError when the run has none of that name or the folder is not there."""
        if name not in self.run.inputs:
            raise UserError(f"run.yaml: inputs.{name} is missing; stage {self.run.stage} needs it")
        folder = self.base / self.run.inputs[name]
        if not folder.is_dir():
            raise UserError(f"run.yaml: inputs.{name}: {folder} is not there; its stage has not finished")
        return folder

    def input_config(self, name: str) -> dict[str, Any]:
        """The configuration that the stage behind an input ran with; UserError for a folder that no stage made."""
        manifest = read_manifest(self.input(name))
        if manifest is None:
            raise UserError(f"run.yaml: inputs.{name}: {self.input(name)} is no artifact of a stage (no artifact.json)")
        return dict(manifest["config"])

    def signature(self) -> dict[str, Any]:
        """What makes the result: configuration, inputs' identities, number of processes."""
        config = self.config.model_dump(mode="json")
        config.get("optimizer", {}).pop("lr_choice", None)  # words for the report
        return {
            "config": config,
            "inputs": {name: _identity(self.base / folder) for name, folder in self.run.inputs.items()},
            "processes": self.run.launch.processes,
        }

    def differs(self, other: dict[str, Any]) -> str:
        """In what ``other`` (a manifest, or a checkpoint's signature) is of another run than this one; empty when in nothing."""
        mine = self.signature()
        config = json.loads(json.dumps(other["config"]))
        config.get("optimizer", {}).pop("lr_choice", None)
        processes = other["processes"] if "processes" in other else other["launch"]["processes"]
        if config != mine["config"]:
            keys = sorted(k for k in config.keys() | mine["config"].keys() if config.get(k) != mine["config"].get(k))
            return f"config.{keys[0]} was {config.get(keys[0])}, is {mine['config'].get(keys[0])}"
        if other["inputs"] != mine["inputs"]:
            return f"inputs were {other['inputs']}, are {mine['inputs']}"
        return "" if processes == mine["processes"] else f"processes were {processes}, are {mine['processes']}"

    def log(self, **row: Any) -> None:
        """Appends one line to metrics.jsonl (first process only)."""
        if self.is_main:
            with (self.work / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


def peak_memory() -> int:
    """Bytes of main memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_run(path: Path) -> Run:
    """Reads and checks a run.yaml; UserError names the file and the key."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; usage: python -m jobs.<stage> run.yaml")
    try:
        return Run.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None


def main(stage: str, body: Callable[[Context[Any]], None]) -> NoReturn:
    """Runs ``body`` for the run.yaml named on the command line, and exits: 0 done, 2 the user's mistake, 1 failed."""
    work: Path | None = None
    try:
        if len(sys.argv) != 2:
            raise UserError(f"usage: python -m jobs.{stage} run.yaml")
        path = Path(sys.argv[1]).resolve()
        run = read_run(path)
        if run.stage != stage:
            raise UserError(f"{path}: stage is {run.stage!r}; this is jobs.{stage}")
        _check_processes(run, path)
        try:
            config = STAGES[stage].model_validate(run.config)
        except ValidationError as error:
            raise UserError(f"{path}: config: {_one_line(error)}") from None
        context = Context(run, config, path.parent)
        work = context.work
        work.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half-written is removed
        finished = read_manifest(context.out)
        if finished is None:
            _run_body(context, body)
        elif difference := context.differs(finished):
            raise UserError(f"{path}: {context.out} holds the result of another run ({difference}); name another folder in out")
    except UserError as error:
        _fail(work, str(error), 2)
    except RunFailed as error:
        _fail(work, str(error), 1)
    except Exception as error:
        traceback.print_exc()
        _fail(work, f"{type(error).__name__}: {_one_line(error)}", 1)
    sys.stdout.flush()
    sys.exit(0)


def _run_body(context: Context[Any], body: Callable[[Context[Any]], None]) -> None:
    started = time.time()
    if context.is_main:
        (context.work / "failure.json").unlink(missing_ok=True)
    if not context.is_main:
        body(context)  # only the first process writes: the others compute beside it
        return
    final = context.out
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
            started=started,
            facts=context.facts,
        )
    shutil.rmtree(context.work / "checkpoint", ignore_errors=True)  # the artifact is in place: nothing reads them any more


def _identity(folder: Path) -> str:
    manifest = read_manifest(folder)
    return str(manifest["id"]) if manifest else str(folder)


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


def _fail(work: Path | None, reason: str, code: int) -> NoReturn:
    """Says why on stderr and in failure.json, and exits without waiting for other processes that may hang in a collective."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    if work is not None and work.is_dir() and int(os.environ.get("RANK", "0")) == 0:
        write_json(work / "failure.json", {"reason": reason})
    sys.stdout.flush()
    os._exit(code)
