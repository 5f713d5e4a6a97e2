"""The order of the work on many machines: a discrete-event simulation drives the study's own `Schedule`, without Ray.

Every trial takes another time than the plan expects, and what the schedule said of machines is checked at each start.
"""

import heapq
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import schedule as scheduling
from cluster.graph import Node, Plan
from cluster.plan import make_plan
from cluster.room import Need
from cluster.schedule import Schedule
from cluster.store import Stop, Store
from cluster.study import load_study

GPUS, MACHINES = 8, 8

STUDY = """\
study: big
seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8]
datasets:
  a: {planted: {users: 200000, items: 40000, mean_length: 16}}
  b: {planted: {users: 60000, items: 12000, mean_length: 12}}
protocols: [leave-one-out, temporal]
cf: []
sid:
  encoders:
    small: {fresh: {layers: 4, d_model: 256, heads: 4, d_ff: 1024, optimizer: {steps: 2000, global_batch: 256, lr: 0.001}}}
  quantizers: {rk: {levels: 3, width: 256}}
  train: {optimizer: {steps: 20000, global_batch: 1024, lr: 0.01, lr_at_d_model: 64}}
  ladder:
    - {name: xs, layers: 2, d_model: 64, heads: 4, d_kv: 16, d_ff: 256}
    - {name: s, layers: 3, d_model: 128, heads: 4, d_kv: 32, d_ff: 512}
    - {name: m, layers: 4, d_model: 256, heads: 8, d_kv: 32, d_ff: 1024}
    - {name: l, layers: 6, d_model: 384, heads: 8, d_kv: 48, d_ff: 1536}
    - {name: xl, layers: 8, d_model: 512, heads: 8, d_kv: 64, d_ff: 2048, launch: {processes: 2}}
    - {name: xxl, layers: 10, d_model: 768, heads: 12, d_kv: 64, d_ff: 3072, launch: {processes: 4}}
llm:
  pretrain: {optimizer: {steps: 30000, global_batch: 1024, lr: 0.001, lr_at_d_model: 64}}
  train: {lora: {rank: 16}, optimizer: {steps: 10000, global_batch: 512, lr: 0.001, lr_at_d_model: 64}}
  ladder:
    - {name: xs, layers: 4, d_model: 128, heads: 4, d_ff: 256}
    - {name: s, layers: 6, d_model: 256, heads: 4, d_ff: 768}
    - {name: m, layers: 8, d_model: 512, heads: 8, d_ff: 1536, launch: {processes: 2}}
    - {name: l, layers: 12, d_model: 768, heads: 12, d_ff: 2304, launch: {processes: 4}}
    - {name: xl, layers: 16, d_model: 1024, heads: 16, d_ff: 3072, launch: {processes: 8}}
resources: {gpus_per_process: 1, gpu_memory: 80, flops_per_second: 2.0e+13}
"""
"""400 points (bayes-optimal comes with each planted world), about 1000 stages, rungs of an eighth of a GPU to eight."""

FORMS = {
    "realistic": [],
    # Many short rungs that need a whole machine behind long ones of one GPU: the hard case for a first-come order.
    "short-and-wide": [
        "sid.ladder[0].launch.processes=8",
        "sid.ladder[1].launch.processes=8",
        "sid.ladder[4].launch.processes=1",
        "sid.ladder[5].launch.processes=1",
    ],
    "wide": [f"{part}.ladder[{i}].launch.processes={n}" for part in ("sid", "llm") for i, n in enumerate((1, 2, 4, 8, 8))],
}


class Cluster:
    """Time, and machines of 8 GPUs and 96 cores."""

    def __init__(self, plan: Plan, store: Store, done: set[str], truth: Callable[[Node], float]) -> None:
        self.plan, self.done, self.truth, self.now = plan, done, truth, 0.0
        self.total = {f"machine{i}": Need(96, GPUS, 1e12) for i in range(MACHINES)}
        self.schedule = Schedule(plan, store, "jobs", Stop(), lambda: self.total, lambda: self.now)
        self.running: list[tuple[float, str, dict[str, Any], list[str]]] = []
        self.work, self.longest = 0.0, 0.0

    def run(self) -> float:
        """Seconds until everything is done."""
        names = (str(i) for i in range(100_000))
        trial = next(names)
        while True:
            while isinstance(config := self.schedule.suggest(trial), dict):
                self.start(trial, config)
                trial = next(names)
            if not self.running:
                return self.now
            self.now, ended, _, nodes = heapq.heappop(self.running)
            self.done.update(nodes)
            self.schedule.on_trial_complete(ended)

    def start(self, trial: str, config: dict[str, Any]) -> None:
        nodes = [Path(path).parent.name.rsplit("-", 1)[1] for path in config["runs"]]
        seconds = sum(self.truth(self.plan.nodes[node]) for node in nodes)
        for node in nodes:
            assert {i for i in self.plan.nodes[node].inputs.values() if i in self.plan.nodes} <= self.done | set(nodes)
        heapq.heappush(self.running, (self.now + seconds, trial, config, nodes))
        used = [Need(**c["need"]) for _, _, c, _ in self.running if c["machine"] == config["machine"]]
        assert all(sum(column) <= most for column, most in zip(zip(*used, strict=True), self.total["machine0"], strict=True))
        self.work += seconds * config["need"]["gpus"]
        self.longest = max(self.longest, seconds)


def truth(plan: Plan, seed: int, sigma: float) -> Callable[[Node], float]:
    """What a stage really takes: the estimate, off by a factor of its kind of stage, and by one of its own (both lognormal)."""
    random_ = random.Random(seed)
    kinds = {stage: random_.lognormvariate(0, sigma) for stage in sorted({node.stage for node in plan.nodes.values()})}
    return lambda node: (
        scheduling.cost.seconds(plan, node) * kinds[node.stage] * random.Random(f"{seed}{node.id}").lognormvariate(0, sigma / 2)
    )


@pytest.mark.parametrize(
    ("form", "sigma"),
    [
        ("realistic", 0.3),
        ("short-and-wide", 0.6),
        *(pytest.param(form, sigma, marks=pytest.mark.slow) for form in FORMS for sigma in (0.0, 0.45)),
    ],
)
def test_64_gpus_are_busy(form: str, sigma: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makespan against max(work / GPUs, longest trial), which no order can beat."""
    (tmp_path / "study.yaml").write_text(STUDY)
    plan = make_plan(load_study(tmp_path / "study.yaml", FORMS[form]))
    assert len(plan.points) == 400
    done: set[str] = set()  # 1000 stages: what lies on disk is another test's matter
    monkeypatch.setattr(scheduling, "write_missing_rows", lambda *_: None)
    monkeypatch.setattr(Store, "write_run", lambda self, node, plan: self.work(node) / "run.yaml")  # noqa: ARG005
    monkeypatch.setattr(Store, "done", lambda self, node: node.id in done)  # noqa: ARG005
    cluster = Cluster(plan, Store(tmp_path / "out"), done, truth(plan, 1, sigma))
    makespan = cluster.run()
    bound = max(cluster.work / (GPUS * MACHINES), cluster.longest)
    print(f"{form}, noise {sigma}: {makespan / 3600:.2f} h, bound {bound / 3600:.2f} h: {makespan / bound:.3f}")
    assert len(done) == len(plan.nodes)
    assert makespan <= 1.25 * bound
