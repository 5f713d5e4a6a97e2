"""One learning rate for a whole ladder, against one swept for each rung: decoder-only SID recommenders on a planted world.

The fixed rate is the smallest rung's best one, as if it had been tuned where that is cheap and kept. Expected: the fixed ladder
bends (its largest rung is worse than the one before), the tuned one does not. docs/tuning.md has what came out.

    .venv/bin/python tests/benchmarks/tuned_ladder.py [OUT]
"""

import itertools
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster import run as runs
from cluster.measure import read_row
from cluster.store import Store, open_store
from cluster.study import load_study
from cluster.tuning import Records

RATES = [0.002, 0.005, 0.012, 0.03, 0.07]
OPTIMIZER = "sid.train.optimizer={steps: 300, global_batch: 32, validations: 6, lr: %s}"
STUDY = """
study: tuned-ladder
seeds: [0]
datasets: {world: {planted: {users: 1500, items: 300, mean_length: 16}}}
cf: [popularity]
sid:
  encoders: {words: {tfidf: {dims: 64}}}
  quantizers: {rk: {levels: 2, width: 32}}
  train:
    architecture: decoder-only
    dropout: 0.0
    max_history: 16
    optimizer: {steps: 300, lr: 0.01}
  ladder:
    - {name: xs, layers: 2, d_model: 16, heads: 2, d_kv: 8, d_ff: 32}
    - {name: s, layers: 2, d_model: 32, heads: 2, d_kv: 16, d_ff: 64}
    - {name: m, layers: 2, d_model: 64, heads: 4, d_kv: 16, d_ff: 128}
    - {name: l, layers: 2, d_model: 128, heads: 4, d_kv: 32, d_ff: 256}
"""


def ladder(study: Path, out: Path, lr: str) -> list[dict[str, Any]]:
    """Runs the study with that ``lr``; the rows of its rungs, smallest first."""
    if runs.run_study(load_study(study, [OPTIMIZER % lr]), out) != 0:
        sys.exit("the study did not end well")
    store, plan = open_store(out)
    rows = [row for point in plan.points if (row := read_row(store.row(point))) is not None]
    return sorted((row for row in rows if row["paradigm"] == "sid"), key=lambda row: row["n_rs"])


def main(out: Path) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    study = out / "study.yaml"
    study.write_text(STUDY)
    tuned = ladder(study, out / "study", f"{{tune: {RATES}, steps: 0.25}}")
    store, plan = open_store(out / "study")
    sweep(plan.trials, store)
    fixed = ladder(study, out / "study", str(tuned[0]["lr"]))
    columns = " | ".join(f"{name + ' lr':>8} {'loss':>6} {'recall@10':>9}" for name in ("fixed", "tuned"))
    print(f"\n{'rung':4} {'weights':>9} | {columns}")
    for one, other in zip(fixed, tuned, strict=True):
        cells = [f"{row['lr']:8g} {row['loss_val']:6.3f} {row['recall@10']:9.4f}" for row in (one, other)]
        print(f"{one['model']:4} {one['n_rs']:9,} | {cells[0]} | {cells[1]}")
    for name, rows in (("fixed", fixed), ("tuned", tuned)):
        gains = [f"{b['loss_val'] - a['loss_val']:+.3f}" for a, b in itertools.pairwise(rows)]
        bends = any(b["loss_val"] > a["loss_val"] for a, b in itertools.pairwise(rows))
        print(
            f"{name}: change of the validation loss from rung to rung {', '.join(gains)}: {'bends' if bends else 'does not bend'}"
        )


def sweep(trials: list[Any], store: Store) -> None:
    """Prints each rung's validation loss at each rate of the sweep."""
    records = Records(store.folder)
    print(f"\n{'validation loss at 25% of the steps':36}" + "".join(f"{lr:>8g}" for lr in RATES))
    for name in dict.fromkeys(trial.sweep for trial in trials):
        losses = {trial.lr: records.read(trial.nodes[-1]) for trial in trials if trial.sweep == name}
        cells = [f"{found.loss_val:8.3f}" if (found := losses[lr]) and found.loss_val else f"{'-':>8}" for lr in RATES]
        print(f"{name:36}" + "".join(cells))
    of = {(trial.sweep, trial.lr): found.loss_val for trial in trials if (found := records.read(trial.nodes[-1]))}
    ladders = [[of.get((name, lr)) or math.inf for name in dict.fromkeys(trial.sweep for trial in trials)] for lr in RATES]
    cells = ["bends" if any(b > a for a, b in itertools.pairwise(ladder)) else "no" for ladder in ladders]
    print(f"{'a ladder of that rate alone':36}" + "".join(f"{cell:>8}" for cell in cells))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="gr") as folder:
            main(Path(folder))
