"""The machines of a Ray cluster: which of them may get a study's work."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.graph import Plan
from cluster.room import Need
from cluster.store import Store
from gr.errors import UserError

REQUIREMENTS = ("accelerate", "peft", "torch", "transformers")
"""Distributions that must be the same everywhere, or a point's result would depend on where it ran."""
ANSWER = 120.0
"""Seconds that a machine may take to start a worker and look at the study's folder."""
DEATH = 20.0
"""Seconds within which Ray's head notices that a machine is gone, by its default settings."""
APPEARS = 10.0
"""Seconds by which a network file system may be late to show another machine's file."""
logger = logging.getLogger(__name__)


def machines() -> dict[str, Need]:
    """What each living machine of the cluster has in all, by its id."""
    return {id: _has(node) for id, node in _living().items()}


def _living() -> dict[str, dict[str, Any]]:
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _has(node: dict[str, Any]) -> Need:
    return Need(*(float(node["Resources"].get(name, 0)) for name in ("CPU", "GPU", "memory")))


@dataclass
class _Asked:
    """A machine that was asked to look at the study, when, and since when its answer is there."""

    node: dict[str, Any]
    answer: Any
    at: float
    answered: float | None = None


class Checked:
    """The cluster's machines that see the study's folder and data and have what its jobs import.

    Each has to read a file of ours there and to write one that we can read, in a task of its own. All that are there at the start
    have to pass (`wait`). One that joins later is asked while the study goes on: it gets work once it has passed, or none, and
    then a line says why.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        self.paths, self.folder, self.mine = _outside(plan), store.folder, installed()
        self.probe = store.folder / "work" / f".probe-{os.getpid()}"
        self.asked: dict[str, _Asked] = {}
        self.passed: set[str] = set()
        self.refused: set[str] = set()

    def __enter__(self) -> "Checked":
        return self

    def __exit__(self, *_: object) -> None:
        self._tidy()

    def wait(self) -> None:
        """UserError, naming the machine, unless all that are there now pass."""
        while True:
            for words in self._look():
                raise UserError(f"--ray: {words}")
            if not self.asked:
                return
            time.sleep(0.2)

    def __call__(self) -> dict[str, Need]:
        """What those that have passed have in all, by their ids."""
        try:
            for words in self._look():
                logger.warning("%s; it gets no work", words)
        except OSError as error:  # of a full disk, or a file system that hangs: no reason to end what runs
            logger.warning("a machine that joined could not be asked yet: %s", error)
        return {id: need for id, need in machines().items() if id in self.passed}

    def _look(self) -> Iterator[str]:
        """Asks who is new and hears who has answered; what is to be said of those that did not pass."""
        nodes = _living()
        for id in nodes.keys() - self.asked.keys() - self.passed - self.refused:
            if _has(nodes[id]).cpus > 0:
                self.asked[id] = self._ask(nodes[id])
            else:
                self.passed.add(id)  # as a head often is: no job will run there
        for id, asked in list(self.asked.items()):
            words = self._hear(asked) if id in nodes else None
            if id in nodes and words is None:
                continue
            del self.asked[id]  # answered, or dead
            if words == "":
                self.passed.add(id)
            elif words:
                self.refused.add(id)
                yield f"{_named(asked.node)} {words}"
        if not self.asked:
            self._tidy()

    def _tidy(self) -> None:
        if self.probe.is_dir():
            shutil.rmtree(self.probe)

    def _ask(self, node: dict[str, Any]) -> _Asked:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.probe.mkdir(exist_ok=True)
        (self.probe / "probe").touch()
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
        return _Asked(node, task.remote(str(self.probe), self.paths, node["NodeID"]), time.monotonic())

    def _hear(self, asked: _Asked) -> str | None:
        """What keeps work from a machine; empty if nothing does; None as long as that is not known."""
        import ray

        now = time.monotonic()
        if not ray.wait([asked.answer], timeout=0)[0]:
            return None if now - asked.at < ANSWER else f"did not answer within {ANSWER:.0f} s"
        asked.answered = asked.answered or now
        waited = now - asked.answered
        try:
            found = ray.get(asked.answer)
        except Exception as error:  # Ray's many words for a worker that could not start
            return None if waited < DEATH else f"can't run anything: {str(error).split(chr(10))[0]}"
        # A look into the folder is what refreshes a network file system's entries.
        appeared = asked.node["NodeID"] in os.listdir(self.probe)  # noqa: PTH208
        if found["writes"] and not appeared and waited < APPEARS:
            return None
        return against(found, self.mine, self.folder, appeared)


def look(folder: str, paths: list[str], name: str) -> dict[str, Any]:
    """Runs on a machine of the cluster: what it sees of the study, and what it has installed."""
    there = Path(folder)
    found: dict[str, Any] = {"sees": (there / "probe").is_file(), "writes": False}
    if found["sees"]:
        with contextlib.suppress(OSError):
            (there / name).write_text(name)
            found["writes"] = True
    found["missing"] = [path for path in paths if not Path(path).exists()]
    return found | installed()


def installed() -> dict[str, str | None]:
    """The versions of Python and of what jobs import; None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in REQUIREMENTS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def against(found: dict[str, Any], mine: dict[str, str | None], folder: Path, appeared: bool) -> str:
    """What speaks against a machine that found this, where we have ``mine``; empty if nothing does."""
    shared = "it has to lie on a file system that every machine of the cluster has at the same path (--out)"
    if not found["sees"]:
        return f"can't see {folder}; {shared}"
    if not (found["writes"] and appeared):
        return f"can't write in {folder}; {shared}"
    if found["missing"]:
        return f"can't see {found['missing'][0]}, which the study reads"
    for package in ("python", *REQUIREMENTS):
        if found[package] != mine[package]:
            has = f"has {package} {found[package]}" if found[package] else f"has no {package}"
            return f"{has}, this machine {mine[package]}; give every machine the same environment"
    return ""


def _outside(plan: Plan) -> list[str]:
    """What the study reads from outside its folder: data sets and models in folders."""
    inputs = {path for node in plan.nodes.values() for path in node.inputs.values() if path not in plan.nodes}
    models = {str(node.config["model"]) for node in plan.nodes.values() if node.config.get("model")}
    return sorted(inputs | {model for model in models if Path(model).is_absolute()})


def _named(node: dict[str, Any]) -> str:
    return f"machine {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, Ray's node {node['NodeID'][:8]})"


def check_room(plan: Plan, needs: Iterable[tuple[str, Need]], having: dict[str, Need]) -> None:
    """UserError when no machine has room for a stage: it would wait for ever. ``needs``: (a node's id, what it needs)."""
    for id, need in needs:
        if any(need.within(total).fits(total) for total in having.values()):
            continue
        node, most = plan.nodes[id], max(having.values())
        raise UserError(
            f"launch: {node.key} needs {need.cpus:g} CPUs and {need.gpus:g} GPUs ({node.processes} processes x {node.threads}"
            f" threads) of one machine; the largest has {most.cpus:g} and {most.gpus:g}. Several machines for one rung:"
            " slurm/README.md"
        )
