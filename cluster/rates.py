"""Each rung's learning rate in the plan: stated, scaled from another width, or from a sweep, whose trials are planned here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster import tuning
from cluster.spec import LlmRung, SidRung, StudyOptimizer, TunedOptimizer
from cluster.tuning import Choice, Records, Sweep

R = TypeVar("R", SidRung, LlmRung)


@dataclass(frozen=True)
class SweepTrial:
    """One learning rate of a rung's sweep: what its training is, and which sweep it is a trial of (`cluster.tuning`)."""

    run_id: str
    sweep: str
    lr: float
    scheduler: str
    nodes: tuple[str, ...]


class Rates:
    """``trials``: of every sweep that was asked for, by their names; ``records``, ``priced``: see `cluster.plan.make_plan`."""

    def __init__(self, records: Records | None, priced: bool) -> None:
        self.records, self.priced = records, priced
        self.trials: dict[str, SweepTrial] = {}

    def of(
        self,
        name: str,
        optimizer: TunedOptimizer,
        ladder: Sequence[R],
        rung: R,
        train: Callable[[R, dict[str, Any], int], str | None],
        own: bool = True,
    ) -> dict[str, Any] | None:
        """The job's optimizer for a rung; None as long as the sweep it waits for has not ended, whose trials are planned then.

        ``name``: of the sweep, with a place for the rung's; ``own``: whether the rung's ``lr`` and ``steps`` are of it;
        ``train`` plans one (rung, optimizer, seed), and returns None where it waits for another sweep.
        """
        sweep, lr, steps = optimizer.lr, rung.lr if own else None, rung.steps if own else None
        if lr is not None or not isinstance(sweep, Sweep):
            return resolve(optimizer, rung.d_model, lr, steps)
        swept = [other for other in ladder if not own or other.lr is None]
        if sweep.transfer == "smallest":
            swept = [swept[i] for i in tuning.smallest_two([other.d_model or 0 for other in swept])]
        if rung in swept:
            choice = self._choice(name, sweep, optimizer, rung, train, own)
        else:
            found = [(other, self._choice(name, sweep, optimizer, other, train, own)) for other in swept]
            anchors = [(other.name, other.d_model, choice) for other, choice in found if choice and other.d_model]
            choice = tuning.transferred(rung.d_model, anchors) if len(anchors) == 2 and rung.d_model else None
        if choice is None and self.priced:
            choice = Choice(sweep.tune[0], tuning.UNKNOWN)
        return _optimizer(optimizer, choice.lr, choice.words, steps) if choice else None

    def _choice(
        self,
        name: str,
        sweep: Sweep,
        optimizer: TunedOptimizer,
        rung: R,
        train: Callable[[R, dict[str, Any], int], str | None],
        own: bool,
    ) -> Choice | None:
        outcomes = []
        steps = max(1, round(sweep.steps * ((rung.steps if own else None) or optimizer.steps)))
        for lr in sweep.tune:
            node = train(rung, _optimizer(optimizer, lr, "a trial of a sweep", steps), tuning.SEED)
            if node is None:
                return None
            title = name.format(rung.name)
            trial = SweepTrial(f"{title}-lr{lr:.12g}", title, lr, sweep.scheduler, (node,))
            self.trials[trial.run_id] = trial
            outcomes.append(self.records.decided(node, sweep.scheduler) if self.records else None)
        return tuning.choose(title, sweep, [o for o in outcomes if o]) if all(outcomes) else None


def _optimizer(optimizer: StudyOptimizer, lr: float, words: str, steps: int | None) -> dict[str, Any]:
    values = optimizer.model_dump(exclude={"lr_at_d_model"})
    return {**values, "lr": lr, "lr_choice": words, "steps": steps or values["steps"]}


def resolve(optimizer: StudyOptimizer, d_model: int | None, lr: float | None = None, steps: int | None = None) -> dict[str, Any]:
    """The job's optimizer for one rung, with how its learning rate was chosen.

    With ``lr_at_d_model`` the rate of every weight falls as 1/width, in standard parametrisation. That is the rule of muP for the
    hidden weights under Adam (Yang et al. 2022, table 3) without its other rules, and no rung's rate is swept: a rule of thumb.
    """
    values = optimizer.model_dump(exclude={"lr_at_d_model"})
    if steps is not None:
        values["steps"] = steps
    if lr is not None:
        return {**values, "lr": lr, "lr_choice": "stated for this rung"}
    if optimizer.lr_at_d_model is not None and d_model is not None:
        chosen = float(f"{optimizer.lr * optimizer.lr_at_d_model / d_model:.12g}")  # one spelling on every machine
        words = f"scaled by 1/width from d_model {optimizer.lr_at_d_model}, not swept"
        return {**values, "lr": chosen, "lr_choice": words}
    return values
