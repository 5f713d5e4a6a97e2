"""Sweeps of the learning rate: what a trial ended as, which rate the trials speak for, and the words that say how it was chosen.

A sweep belongs to one rung of one stage; its trials are ordinary trainings with a share of the steps, at a seed that no measured
point uses, judged by their validation loss. `docs/tuning.md` says what that can and can't tell.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from gr.errors import UserError
from gr.files import read_json, write_json
from jobs.options import Config

if TYPE_CHECKING:
    from cluster.graph import Plan
    from cluster.rates import SweepTrial
    from cluster.spec import TunedOptimizer
    from cluster.store import Store
    from cluster.study import Loaded

SEED = 1000
"""Of every trial of every sweep."""
EDGE = "lr-edge"
"""The warning in ``lr_choice``."""
UNKNOWN = "unknown before its sweep"
"""``lr_choice`` of a point that is priced and not yet resolved."""
DIVERGED = re.compile(r"(validation )?loss is (nan|-?inf)\b")
Status = Literal["done", "stopped", "diverged"]


class Sweep(Config):
    """Learning rates to try for each rung before its points are measured.

    ``steps``: a trial's share of the rung's steps. ``scheduler``: of Ray Tune, may stop a trial whose validation loss lags.
    ``choose``: the rate of least loss, or the minimum of a parabola through it and its neighbours. ``transfer`` "smallest": sweep
    the two smallest widths alone and carry log lr = a + b log d_model to the other rungs.
    """

    tune: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3)]
    steps: Annotated[float, Field(gt=0, le=1)] = 0.25
    scheduler: Literal["none", "asha", "median"] = "none"
    choose: Literal["least", "parabola"] = "least"
    transfer: Literal["none", "smallest"] = "none"

    @field_validator("tune")
    @classmethod
    def _rising(cls, rates: list[float]) -> list[float]:
        if len(set(rates)) < len(rates):
            raise ValueError("something is listed twice")
        return sorted(rates)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. ``step``: where it was stopped, or its last one; ``loss_val``: its least one, or the one it was stopped
    for (nats), None where it diverged; ``scheduler``: the one that stopped it."""

    sweep: str
    lr: float
    status: Status
    step: int | None
    loss_val: float | None
    scheduler: str | None = None


class Records:
    """The outcomes of a study's trials, one file each, by the trial's identity: ``tuning/<id>.json``."""

    def __init__(self, study_folder: Path) -> None:
        self.folder = study_folder / "tuning"

    def read(self, node: str) -> Outcome | None:
        """None where the trial has not ended. UserError for a damaged record."""
        file = self.folder / f"{node}.json"
        if not file.is_file():
            return None
        try:
            return Outcome(**read_json(file))
        except (ValueError, TypeError):
            raise UserError(f"{file}: damaged; remove it, and the same `grscale run` tries that rate again") from None

    def decided(self, node: str, scheduler: str) -> Outcome | None:
        """The outcome, if it counts in a sweep under ``scheduler``: what another one stopped has to run on."""
        found = self.read(node)
        return None if found and found.status == "stopped" and found.scheduler != scheduler else found

    def write(self, node: str, outcome: Outcome) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{node}.json", asdict(outcome))


@dataclass(frozen=True)
class Choice:
    """A learning rate, and how it was chosen, for the report."""

    lr: float
    words: str


def choose(name: str, sweep: Sweep, outcomes: Sequence[Outcome]) -> Choice:
    """The rate of the least validation loss among the trials that ran to their end; of equal ones the smallest.

    With ``choose: parabola``, the minimum of the parabola in log lr through that trial and its two neighbours, where all three
    ran to their end. UserError where no trial did.
    """
    done = sorted((o.lr, o.loss_val) for o in outcomes if o.status == "done" and o.loss_val is not None)
    if not done:
        named = ", ".join(f"{lr:g}" for lr in sweep.tune)
        raise UserError(f"{name}: none of the learning rates {named} trained to the end; give smaller ones")
    best, _ = min(done, key=lambda trial: (trial[1], trial[0]))
    words = f"swept over {len(sweep.tune)} values at {sweep.steps:.0%} of the steps, seed {SEED}, least validation loss"
    words += f"; scheduler {sweep.scheduler}"
    rates, at = sweep.tune, sweep.tune.index(best)
    if at in (0, len(rates) - 1):
        return Choice(best, f"{words}; {EDGE}: {best:g} is the {'largest' if at else 'smallest'} of them")
    losses = dict(done)
    around = [(rate, losses[rate]) for rate in rates[at - 1 : at + 2] if rate in losses]
    if sweep.choose == "least" or len(around) < 3:
        return Choice(best, words)
    named = ", ".join(f"{rate:g}" for rate, _ in around)
    return Choice(vertex(around), f"{words}; minimum of the parabola in log lr through {named}")


def vertex(points: Sequence[tuple[float, float]]) -> float:
    """Where the parabola in log lr through three (lr, loss) has its minimum, to 4 digits; the middle loss is the least of them.

    It lies between the outer two. With a flat parabola, the middle rate.
    """
    (a, fa), (b, fb), (c, fc) = ((math.log(lr), loss) for lr, loss in points)
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    if left == right:
        return points[1][0]
    return _rounded(math.exp(b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)))


def transferred(d_model: int, anchors: Sequence[tuple[str, int, Choice]]) -> Choice:
    """log lr = a + b log d_model through two swept rungs (name, width, choice), at ``d_model``; to 4 digits."""
    (name, width, choice), (other, other_width, other_choice) = anchors
    b = math.log(other_choice.lr / choice.lr) / math.log(other_width / width)
    lr = _rounded(choice.lr * (d_model / width) ** b)
    words = f"log lr = a + b log d_model, b = {b:.2f}, through {name} ({choice.lr:g}) and {other} ({other_choice.lr:g}), each "
    words += choice.words
    if EDGE not in choice.words and EDGE in other_choice.words:
        words += f"; {EDGE}: {other_choice.lr:g} of {other}"
    return Choice(lr, words)


def check(loaded: "Loaded") -> None:
    """UserError where a study's sweeps can't be made: the trials' seed is measured, or a transfer has no two widths to go by."""
    study = loaded.study
    ladders: list[tuple[str, str, TunedOptimizer, list[tuple[int | None, float | None]]]] = []
    if study.sid:
        ladders.append(("sid", "train", study.sid.train.optimizer, [(r.d_model, r.lr) for r in study.sid.ladder]))
    if study.llm:
        ladders.append(("llm", "train", study.llm.train.optimizer, [(r.d_model, r.lr) for r in study.llm.ladder]))
        if study.llm.pretrain:
            fresh: list[tuple[int | None, float | None]] = [(r.d_model, None) for r in study.llm.ladder if r.model is None]
            ladders.append(("llm", "pretrain", study.llm.pretrain.optimizer, fresh))
    for key, part, optimizer, rungs in ladders:
        sweep, where = optimizer.lr, loaded.where((key, part, "optimizer", "lr"))
        if not isinstance(sweep, Sweep):
            continue
        if SEED in study.seeds:
            raise UserError(f"{loaded.where(('seeds',))}: seeds: {SEED} is the seed of every sweep's trials; take another one")
        widths = [width for width, lr in rungs if lr is None]
        if sweep.transfer == "smallest" and (None in widths or len(set(widths)) < 2):
            lacks = "a model from outside has no d_model here" if None in widths else "there are not two widths to sweep"
            raise UserError(f"{where}: {key}.{part}.optimizer.lr.transfer: {lacks}; state that rung's lr, or leave transfer out")


def smallest_two(widths: Sequence[int]) -> list[int]:
    """The places of the two rungs to sweep: the first ones of the two smallest widths (fewer where there are fewer)."""
    return [list(widths).index(width) for width in sorted(set(widths))[:2]]


def edges(choices: Iterable[tuple[str, str]]) -> str:
    """The report's warning, from (rung, lr_choice) of its points; empty without one."""
    rungs = dict.fromkeys(rung for rung, words in choices if EDGE in words)
    if not rungs:
        return ""
    return f"{EDGE}: the best learning rate of {', '.join(rungs)} is at the edge of its list; a wider one may hold a better rate."


def _rounded(lr: float) -> float:
    return float(f"{lr:.4g}")  # one spelling on every machine


def open_trials(plan: "Plan", store: "Store") -> list["SweepTrial"]:
    """The trials that have not ended yet, or in a way that decides nothing (a crash, say)."""
    records = Records(store.folder)
    return [trial for trial in plan.trials if records.decided(trial.nodes[-1], trial.scheduler) is None]


def ended(trial: "SweepTrial", plan: "Plan", store: "Store") -> Outcome | None:
    """How a trial ended, by its record, its artifact, or a failure that says that its loss diverged; None where it has not."""
    node = plan.nodes[trial.nodes[-1]]
    if (found := Records(store.folder).decided(node.id, trial.scheduler)) is not None:
        return found
    if (manifest := store.manifest(node)) is not None:
        return Outcome(trial.sweep, trial.lr, "done", manifest["facts"].get("steps"), manifest["facts"]["loss_val"])
    why = store.failure(node)
    return Outcome(trial.sweep, trial.lr, "diverged", None, None) if why and DIVERGED.match(why) else None


def collect(plan: "Plan", store: "Store") -> bool:
    """Records the trials that ran to their end, or whose loss diverged; returns whether there was one."""
    found = [(trial, outcome) for trial in open_trials(plan, store) if (outcome := ended(trial, plan, store)) is not None]
    for trial, outcome in found:
        Records(store.folder).write(trial.nodes[-1], outcome)
    return bool(found)
