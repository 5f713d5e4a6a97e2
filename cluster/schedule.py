"""Which chain of stages runs next, and where: a search algorithm for Ray Tune that follows the graph and fills the machines."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from cluster import cost
from cluster.graph import Chain, Node, Plan
from cluster.measure import write_missing_rows
from cluster.room import Job, Need, Room
from cluster.store import Stop, Store
from cluster.tuning import Records
from gr.files import write_json

LOOK = 5.0
"""Seconds between two looks at which machines the cluster has."""
SHARES = (0.125, 0.25, 0.5)
"""Of a GPU."""
DIED = "its trial died twice (killed, out of memory, or its machine is gone)"
NO_ROOM = "no machine that is left in the cluster has room for it"
logger = logging.getLogger(__name__)


class Schedule(Searcher):  # type: ignore[misc]
    """Suggests, of the chains that are ready, the one with the longest work behind it that may start now, and a machine for it.

    Baselines come first: they cost seconds and are the first to measure. What is suggested has room, so Tune has nothing to
    queue; `cluster.room` says who waits for whom. A chain whose input failed is never ready. A trial that died and left no reason
    is tried once more, on another machine where one has room. Rows of the metrics table are written as their points finish.

    ``machines``: what the cluster has now, by the machines' ids.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        module: str,
        stop: Stop,
        machines: Callable[[], dict[str, Need]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.plan, self.store, self.module, self.stop = plan, store, module, stop
        self.machines, self.clock = machines, clock
        self.finished = {node.id for node in plan.nodes.values() if store.done(node)}
        self.seconds = {node.id: cost.seconds(plan, node) for node in plan.nodes.values()}
        self.needs = {node.id: need(plan, node) for node in plan.nodes.values()}
        self.length = self._critical_paths()
        self.chains = {chain.nodes[0]: chain for chain in plan.chains()}
        self.waiting = [name for name, chain in self.chains.items() if not self.finished.issuperset(chain.nodes)]
        self.waiting.sort(key=lambda name: (self.plan.nodes[name].stage == "baseline", self.length[name]), reverse=True)
        self.running: dict[str, str] = {}
        self.jobs: dict[str, Job] = {}
        self.died: dict[str, str | None] = {}
        """Chain -> the machine where its first trial died."""
        self.room, self.looked = Room(machines()), clock()
        self.trials, self.records = {trial.nodes[-1]: trial for trial in plan.trials}, Records(store.folder)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.stop.asked:
            return str(Searcher.FINISHED)
        self._look()
        jobs = [self._job(name) for name in self.waiting if self.finished.issuperset(self.chains[name].needs)]
        for need_ in {job.need for job in jobs}:
            if not self.room.possible(need_):
                for job in [job for job in jobs if job.need == need_]:
                    self._fail(job.name, NO_ROOM)
                    jobs.remove(job)
        if not jobs:
            return None if self.running else str(Searcher.FINISHED)  # what runs may have to run again
        chosen = self.room.choose(jobs, self.clock())
        if chosen is None:
            return None
        job, machine = chosen
        self.room.take(trial_id, machine, job, self.clock())
        self.waiting.remove(job.name)
        self.running[trial_id] = job.name
        return self._config(self.chains[job.name], machine)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "machine" in result:
            self.room.moved(trial_id, result["machine"])

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None:
        """What became of the trial is read from the disk; Tune's own result and error are not needed."""
        machine = self.room.release(trial_id)
        name = self.running.pop(trial_id)
        chain = self.chains[name]
        self.jobs.pop(name, None)  # less of it may be left
        self.finished.update(node for node in chain.nodes if self.store.done(self.plan.nodes[node]))
        undone = next((node for node in chain.nodes if node not in self.finished), None)
        if undone in self.trials and self.records.decided(undone, self.trials[undone].scheduler) is not None:
            undone = None  # its sweep has no more use for it
        if undone is not None and not self.stop.asked and self.store.failure(self.plan.nodes[undone]) is None:
            (self.store.work(self.plan.nodes[undone]) / "process.json").unlink(missing_ok=True)
            if name in self.died:
                self._fail(name, DIED)
            else:
                self.died[name] = machine
                self.waiting.append(name)
                self.waiting.sort(key=lambda name: self.length[name], reverse=True)
        try:
            write_missing_rows(self.store, self.plan, [p for p in self.plan.points if p.nodes[-1] in self.finished])
        except OSError as error:  # of a full disk; the run writes what is missing at its end, or says that it can't
            logger.warning("a row of the metrics table could not be written: %s", error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is finished is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def _look(self) -> None:
        if self.clock() - self.looked > LOOK:
            self.room.update(self.machines())
            self.looked = self.clock()

    def _left(self, chain: Chain) -> list[str]:
        return [node for node in chain.nodes if node not in self.finished]

    def _job(self, name: str) -> Job:
        if name in self.jobs:
            return self.jobs[name]
        left = self._left(self.chains[name])
        most = Need(*map(max, zip(*(self.needs[node] for node in left), strict=True)))
        self.jobs[name] = Job(name, most, sum(self.seconds[node] for node in left), self.died.get(name))
        return self.jobs[name]

    def _fail(self, name: str, reason: str) -> None:
        node = self.plan.nodes[self._left(self.chains[name])[0]]
        self.store.work(node).mkdir(parents=True, exist_ok=True)
        write_json(self.store.work(node) / "failure.json", {"reason": reason})
        if name in self.waiting:
            self.waiting.remove(name)

    def _config(self, chain: Chain, machine: str) -> dict[str, Any]:
        left = self._left(chain)
        most = self._job(chain.nodes[0]).need.within(self.room.total[machine])
        return {
            "runs": [str(self.store.write_run(self.plan.nodes[node], self.plan)) for node in left],
            "gpus": [self.needs[node].gpus for node in left],
            "need": most._asdict(),
            "machine": machine,
            "module": self.module,
            "trial": left[-1] if left[-1] in self.trials else None,
        }

    def _critical_paths(self) -> dict[str, float]:
        """Seconds from a node's start to the end of the longest work that needs it."""
        length: dict[str, float] = {}
        behind = dict.fromkeys(self.plan.nodes, 0.0)
        for node in reversed(self.plan.nodes.values()):
            length[node.id] = self.seconds[node.id] + behind[node.id]
            for i in node.inputs.values():
                if i in behind:
                    behind[i] = max(behind[i], length[node.id])
        return length


class Stopped(Stopper):  # type: ignore[misc]
    """Ends the whole Tune run when the user asked for it."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002 -- Tune's signature
        return self.stop.asked

    def stop_all(self) -> bool:
        return self.stop.asked


def need(plan: Plan, node: Node) -> Need:
    """What one stage needs of a machine: the cores and GPUs of all its processes, and main memory, counted without torch.

    With the study's ``gpu_memory`` known, a stage of one process on one GPU that needs, doubled for what is not counted, no more
    than an eighth, a quarter or a half of the GPU gets that share of it.
    """
    memory = cost.memory(plan, node)
    gpus = float(node.gpus)
    if gpus == 1 and plan.study.resources.gpu_memory is not None:
        share = 2 * memory / (plan.study.resources.gpu_memory * 1e9)
        gpus = next((part for part in SHARES if share <= part), 1.0)
    rounded = 2.0 ** math.ceil(math.log2(node.processes * memory))  # so that trials of alike needs can share an actor
    return Need(float(node.processes * node.threads), gpus, rounded)


def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    """One bundle per trial: cores, GPUs and memory, where possible on the machine that the schedule chose.

    Ray takes another one only where that is gone, or not free yet after all.
    """
    bundle = {"CPU": config["need"]["cpus"], "GPU": config["need"]["gpus"], "memory": int(config["need"]["memory"])}
    return tune.PlacementGroupFactory([bundle], strategy="STRICT_PACK", _soft_target_node_id=config["machine"])
