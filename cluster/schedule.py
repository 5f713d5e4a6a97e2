"""Which chain of stages runs next: a search algorithm for Ray Tune that follows the graph."""

from typing import Any

from ray import tune
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from cluster import cost
from cluster.measure import write_missing_rows
from cluster.plan import Chain, Plan
from cluster.store import Stop, Store
from gr.files import write_json


class Schedule(Searcher):  # type: ignore[misc]
    """Suggests the ready chain with the longest work behind it; baselines first, they cost seconds and are the first to measure.

    A chain whose input failed is never ready. Rows of the metrics table are written as their points finish.
    """

    def __init__(self, plan: Plan, store: Store, module: str, stop: Stop) -> None:
        super().__init__()
        self.plan, self.store, self.module, self.stop = plan, store, module, stop
        self.waiting = [c for c in plan.chains() if not all(self._done(node) for node in c.nodes)]
        self.running: dict[str, Chain] = {}
        self.length = self._critical_paths()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.stop.asked:
            return str(Searcher.FINISHED)
        ready = [chain for chain in self.waiting if all(self._done(node) for node in chain.needs)]
        if not ready:
            return None if self.running and self.waiting else str(Searcher.FINISHED)
        chain = max(ready, key=lambda c: (self.plan.nodes[c.nodes[0]].stage == "baseline", self.length[c.nodes[0]]))
        self.waiting.remove(chain)
        self.running[trial_id] = chain
        return self._config(chain)

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None:
        """What became of the trial is read from the disk; Tune's own result and error are not needed."""
        chain = self.running.pop(trial_id)
        for node_id in chain.nodes:
            node = self.plan.nodes[node_id]
            if self._done(node_id) or self.stop.asked:
                continue
            if self.store.failure(node) is None:  # the actor itself was killed, and could not say so
                write_json(self.store.work(node) / "failure.json", {"reason": "its trial died (killed, or out of memory)"})
                (self.store.work(node) / "process.json").unlink(missing_ok=True)
            break
        write_missing_rows(self.store, self.plan)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is finished is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def _done(self, node: str) -> bool:
        return self.store.done(self.plan.nodes[node])

    def _config(self, chain: Chain) -> dict[str, Any]:
        nodes = [self.plan.nodes[n] for n in chain.nodes if not self._done(n)]
        return {
            "runs": [str(self.store.write_run(node, self.plan)) for node in nodes],
            "gpus": [node.gpus for node in nodes],
            "cpus": max(node.processes * node.threads for node in nodes),
            "module": self.module,
        }

    def _critical_paths(self) -> dict[str, float]:
        """Seconds from a node's start to the end of the longest work that needs it."""
        length: dict[str, float] = {}
        for node in reversed(self.plan.nodes.values()):
            after = [length[n.id] for n in self.plan.nodes.values() if node.id in n.inputs.values()]
            length[node.id] = cost.seconds(self.plan, node) + max(after, default=0.0)
        return length


class Stopped(Stopper):  # type: ignore[misc]
    """Ends the whole Tune run when the user asked for it."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002 -- Tune's signature
        return self.stop.asked

    def stop_all(self) -> bool:
        return self.stop.asked


def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    """One bundle per trial: the cores of all processes and their GPUs."""
    bundle = {"CPU": float(config.get("cpus", 1))}
    if gpus := max(config.get("gpus", [0])):
        bundle["GPU"] = float(gpus)
    return tune.PlacementGroupFactory([bundle])
