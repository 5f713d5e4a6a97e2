"""Ray Tune's schedulers for sweeps of the learning rate: which trials need not run to their end."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from cluster.graph import Plan
from cluster.rates import SweepTrial
from cluster.store import Store
from cluster.tuning import Outcome, Records

HALVING = 2
"""ASHA's reduction factor (Li et al. 2020, arXiv 1810.05934): about the better half of the trials passes each of its rungs."""
SAMPLES = 2
"""Other trials that the median rule needs (Golovin et al. 2017, section 3.2.1)."""


class PerSweep(FIFOScheduler):  # type: ignore[misc]
    """One scheduler per sweep, since losses of different rungs and stages can't be compared.

    It sees a trial at its validations, but for the last one: by then the trial is paid for. What it stops is recorded.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        super().__init__()
        self.trials: dict[str, SweepTrial] = {trial.nodes[-1]: trial for trial in plan.trials}
        self.optimizers = {node: plan.nodes[node].config["optimizer"] for node in self.trials}
        self.records = Records(store.folder)
        self.schedulers: dict[str, TrialScheduler] = {}
        self.known: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        node = trial.config["trial"]
        if "loss_val" not in result or self.trials[node].scheduler == "none":
            return str(TrialScheduler.CONTINUE)
        step, loss = result["train_step"], result["loss_val"]
        if step >= self.optimizers[node]["steps"]:
            return str(TrialScheduler.CONTINUE)
        scheduler = self._scheduler(node)
        if trial.trial_id not in self.known:
            self.known.add(trial.trial_id)
            scheduler.on_trial_add(tune_controller, trial)
        if scheduler.on_trial_result(tune_controller, trial, result) != TrialScheduler.STOP:
            return str(TrialScheduler.CONTINUE)  # also for PAUSE: a job that was paused would have to load everything again
        mine = self.trials[node]
        self.records.write(node, Outcome(mine.sweep, mine.lr, "stopped", step, loss, mine.scheduler))
        return str(TrialScheduler.STOP)

    def _scheduler(self, node: str) -> TrialScheduler:
        mine = self.trials[node]
        if mine.sweep not in self.schedulers:
            optimizer = self.optimizers[node]
            first = max(1, round(optimizer["steps"] / optimizer["validations"]))
            common: dict[str, Any] = {"time_attr": "train_step", "metric": "loss_val", "mode": "min", "grace_period": first}
            if mine.scheduler == "asha":
                found = ASHAScheduler(**common, max_t=optimizer["steps"], reduction_factor=HALVING, stop_last_trials=False)
            else:
                found = MedianStoppingRule(**common, min_samples_required=SAMPLES)
            self.schedulers[mine.sweep] = found
        return self.schedulers[mine.sweep]
