"""One learning rate for a whole ladder, against one swept for each rung: decoder-only SID recommenders on a planted world.

The fixed rate is the one that the sweep chose for the smallest rung, as if it had been tuned where that is cheap and kept.
Expected: the fixed ladder bends (its largest rung is worse than the one before), the tuned one does not. docs/tuning.md has what
came out; `tests/cluster/test_tuned_ladder.py` asserts it.

    .venv/bin/python tests/benchmarks/tuned_ladder.py [OUT]
"""

import math
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t

from cluster import run as runs
from cluster.measure import read_row
from cluster.store import Store, open_store
from cluster.study import load_study
from cluster.tuning import Records

RATES = [0.0005, 0.0015, 0.004, 0.012, 0.035, 0.1]
OPTIMIZER = "sid.train.optimizer={steps: 100, global_batch: 32, validations: 2, lr: %s}"
STUDY = """
study: tuned-ladder
seeds: [0, 1, 2, 3, 4]
datasets: {world: {planted: {users: 3000, items: 300, mean_length: 10}}}
cf: [popularity]
evaluate: {users: 500}
sid:
  encoders: {words: {tfidf: {dims: 64}}}
  quantizers: {rk: {levels: 2, width: 32}}
  train:
    architecture: decoder-only
    dropout: 0.0
    max_history: 10
    optimizer: {steps: 100, lr: 0.01}
  ladder:
    - {name: xs, layers: 1, d_model: 8, heads: 2, d_kv: 4, d_ff: 16}
    - {name: s, layers: 1, d_model: 32, heads: 2, d_kv: 16, d_ff: 64}
    - {name: m, layers: 1, d_model: 128, heads: 4, d_kv: 32, d_ff: 256}
"""


@dataclass(frozen=True)
class Step:
    """Change of the validation loss (nats) from one rung to the next, paired by seed: mean, and its two-sided 95% interval by
    Student's t."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Ladder:
    """``losses[rung][seed]``, ``rates[rung]``: smallest rung first."""

    names: list[str]
    rates: list[float]
    losses: list[list[float]]

    @property
    def last_step(self) -> Step:
        """Of the two largest rungs."""
        changes = [large - small for small, large in zip(*self.losses[-2:], strict=True)]
        mean = statistics.mean(changes)
        half = float(t.ppf(0.975, len(changes) - 1)) * statistics.stdev(changes) / math.sqrt(len(changes))
        return Step(mean, mean - half, mean + half)


def ladder(study: Path, out: Path, lr: str) -> Ladder:
    """Runs the study with that ``lr``."""
    if runs.run_study(load_study(study, [OPTIMIZER % lr]), out) != 0:
        sys.exit("the study did not end well")
    store, plan = open_store(out)
    rows = [row for point in plan.points if (row := read_row(store.row(point))) is not None and row["paradigm"] == "sid"]
    rungs: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["n_rs"], row["seed"])):
        rungs.setdefault(row["model"], []).append(row)
    losses = [[row["loss_val"] for row in rung] for rung in rungs.values()]
    return Ladder(list(rungs), [rung[0]["lr"] for rung in rungs.values()], losses)


def compare(out: Path) -> tuple[Ladder, Ladder]:
    """(fixed, tuned), both in ``out``: what they share is trained once."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    study = out / "study.yaml"
    study.write_text(STUDY)
    tuned = ladder(study, out / "study", f"{{tune: {RATES}, steps: 1.0}}")
    show_sweep(*open_store(out / "study"))
    return ladder(study, out / "study", str(tuned.rates[0])), tuned


def show_sweep(store: Store, plan: Any) -> None:
    """Prints each rung's validation loss at each rate of the sweep."""
    records = Records(store.folder)
    print(f"\n{'trials: validation loss':36}" + "".join(f"{lr:>8g}" for lr in RATES))
    for name in dict.fromkeys(trial.sweep for trial in plan.trials):
        losses = {trial.lr: records.read(trial.nodes[-1]) for trial in plan.trials if trial.sweep == name}
        cells = [f"{found.loss_val:8.3f}" if (found := losses[lr]) and found.loss_val else f"{'-':>8}" for lr in RATES]
        print(f"{name:36}" + "".join(cells))


def main(out: Path) -> None:
    for title, found in zip(("fixed", "tuned"), compare(out), strict=True):
        print(f"\n{title}: rung, rate, validation loss (mean ± standard deviation of {len(found.losses[0])} seeds)")
        for name, rate, losses in zip(found.names, found.rates, found.losses, strict=True):
            print(f"  {name:3} {rate:8g} {statistics.mean(losses):8.3f} ± {statistics.stdev(losses):.3f}")
        step = found.last_step
        says = "bends" if step.low > 0 else "does not bend" if step.high < 0 else "can't be told"
        print(f"  largest rung against the next: {step.mean:+.3f} (95% interval {step.low:+.3f} to {step.high:+.3f}): {says}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="gr") as folder:
            main(Path(folder))
