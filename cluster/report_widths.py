"""The report on beam width: each rung's metric against the number of beams its trained models were decoded with.

Read from ``widths.parquet``, which has a row per point and width. A width is compared with another on the same trained models, so
differences are paired by seed; their variance is pooled over the rungs of a ladder, which have few seeds each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cluster.figures import NAMES, Curve, Floats, draw_widths
from cluster.report_words import user_gains
from fit.paired import Difference, paired_difference
from gr.errors import UserError

Row = dict[str, Any]
LEVEL = 0.95
"""Of the intervals of differences between widths."""
BAND = 0.9
"""Of the figures' bars."""


@dataclass(frozen=True)
class Step:
    """What ``wide`` beams gain over ``narrow`` ones: the mean over ``seeds`` of the paired differences; ``half`` of its interval,
    None where nothing repeats; ``users``: the paired bootstrap over users, None where the rankings are not at hand."""

    narrow: int
    wide: int
    seeds: int
    mean: float
    half: float | None
    users: Difference | None

    @property
    def grows(self) -> bool:
        return self.half is not None and self.mean > self.half

    @property
    def falls(self) -> bool:
        return self.half is not None and self.mean < -self.half

    def words(self) -> str:
        interval = "" if self.half is None else f" [{self.mean - self.half:+.4f}, {self.mean + self.half:+.4f}]"
        users = "" if self.users is None else f", over users [{self.users.low:+.4f}, {self.users.high:+.4f}]"
        return f"{self.narrow} to {self.wide}: {self.mean:+.4f}{interval}{users}"


def read_widths(study_dir: Path, run_ids: set[str]) -> list[Row]:
    """The rows of widths.parquet whose points are among ``run_ids``; none without such a file, UserError for a damaged one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = study_dir / "widths.parquet"
    if not path.is_file():
        return []
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); delete it, and `grscale report` writes it again") from None
    return [row for row in rows if row["run_id"] in run_ids]


def by_width(rows: list[Row], metric: str, worthwhile: float, study_dir: Path) -> list[dict[str, Any]]:
    """Per ladder (dataset, protocol, paradigm) its rungs with their widths, the differences between them, and a sentence each, as
    fit.json has them. ``worthwhile``: the smallest relative gain per doubling of beams that would be worth paying for."""
    keys = dict.fromkeys((row["dataset"], row["protocol"], row["paradigm"]) for row in rows)
    found = []
    for key in keys:
        here = [row for row in rows if (row["dataset"], row["protocol"], row["paradigm"]) == key]
        models = list(dict.fromkeys(str(row["model"]) for row in here))
        values = {model: _values([row for row in here if str(row["model"]) == model], metric) for model in models}
        steps, halves = _steps(values, partial(_over_users, here, metric, study_dir)), _halves(values)
        rungs = []
        for model in models:
            own = [row for row in here if str(row["model"]) == model]
            widths = [_width(own, w, metric) | {"half": halves.get((model, w))} for w in sorted({row["beams"] for row in own})]
            rungs.append(
                {
                    "model": model,
                    "widths": widths,
                    "differences": [_difference(step) for step in steps[model]],
                    "words": f"{NAMES.get(key[2], key[2])}, {model}: {_sentence(metric, steps[model], widths, worthwhile)}",
                }
            )
        found.append(dict(zip(("dataset", "protocol", "paradigm"), key, strict=True)) | {"rungs": rungs})
    return found


def figure(groups: list[dict[str, Any]], rows: list[Row], metric: str) -> dict[str, bytes]:
    """Of the ladders of one data set and protocol (of `by_width`) and their ``rows``; empty where no width has the metric."""
    curves = []
    for group in groups:
        for rung in group["rungs"]:
            own = [r for r in rows if (r["paradigm"], str(r["model"])) == (group["paradigm"], rung["model"])]
            own = [r for r in own if r.get(metric) is not None]
            shown = [width for width in rung["widths"] if width["mean"] is not None]
            if shown:
                x = np.array([float(r["beams"]) for r in own])
                y = np.array([float(r[metric]) for r in own])
                at, means = (np.array([float(width[name]) for width in shown]) for name in ("beams", "mean"))
                repeat = all(width["half"] is not None for width in shown)
                half = np.array([width["half"] for width in shown]) if repeat else None
                curves.append((rung["model"], Curve(group["paradigm"], x, y, at, means, half)))
    return draw_widths(curves, metric) if curves else {}


def pooled_half(groups: Sequence[Floats], level: float) -> Floats | None:
    """Half the t interval of each group's mean, from the variance within groups pooled over all of them; None where nothing
    repeats."""
    from scipy.special import stdtrit

    n = np.array([len(group) for group in groups])
    dof = int(np.sum(n - 1))
    if not dof:
        return None
    variance = sum(float(np.sum((group - group.mean()) ** 2)) for group in groups) / dof
    half: Floats = float(stdtrit(dof, (1 + level) / 2)) * np.sqrt(variance / n)
    return half


def _values(rows: list[Row], metric: str) -> dict[int, dict[int, float]]:
    """Width -> seed -> metric, where the width has the metric."""
    found: dict[int, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["beams"]):
        if row.get(metric) is not None:
            found.setdefault(row["beams"], {})[row["seed"]] = float(row[metric])
    return found


def _halves(values: dict[str, dict[int, dict[int, float]]]) -> dict[tuple[str, int], float]:
    """(rung, width) -> half of the `BAND` interval of its mean over seeds; empty where no rung has several."""
    found = {}
    for width in sorted({width for widths in values.values() for width in widths}):
        models = [model for model, widths in values.items() if width in widths]
        halves = pooled_half([np.array(list(values[model][width].values())) for model in models], BAND)
        found.update({} if halves is None else {(model, width): float(h) for model, h in zip(models, halves, strict=True)})
    return found


def _over_users(
    rows: list[Row], metric: str, study_dir: Path, model: str, narrow: int, wide: int, seeds: list[int]
) -> Difference | None:
    """Between two widths of a rung, its ``seeds`` averaged per user; None where a ranking is not in the study folder."""
    own = [row for row in rows if str(row["model"]) == model and row["seed"] in seeds]
    of = {beams: user_gains([row for row in own if row["beams"] == beams], metric, study_dir) for beams in (narrow, wide)}
    (users, less), (others, more) = of[narrow], of[wide]
    if users is None or others is None or less is None or more is None or not np.array_equal(users, others):
        return None
    return paired_difference(more, less)


def _steps(
    values: dict[str, dict[int, dict[int, float]]], over_users: Callable[[str, int, int, list[int]], Difference | None]
) -> dict[str, list[Step]]:
    """Rung -> the differences between any two of its widths, over the seeds that have both."""
    found: dict[str, list[Step]] = {model: [] for model in values}
    for pair in sorted({pair for widths in values.values() for pair in combinations(widths, 2)}):
        differences, seeds = {}, {}
        for model, widths in values.items():
            one, other = (widths.get(width, {}) for width in pair)
            if both := sorted(one.keys() & other.keys()):
                differences[model], seeds[model] = np.array([other[seed] - one[seed] for seed in both]), both
        halves = pooled_half(list(differences.values()), LEVEL)
        for i, (model, each) in enumerate(differences.items()):
            half = None if halves is None or not halves[i] else float(halves[i])  # seeds that agree by chance are no proof
            users = over_users(model, *pair, seeds[model])
            found[model].append(Step(*pair, len(each), float(each.mean()), half, users))
    return found


def _sentence(metric: str, steps: list[Step], measured: list[dict[str, Any]], worthwhile: float) -> str:
    """Up to which width the metric grows beyond noise, what the widest costs beside it, and whether more is known not to pay."""
    if not steps:
        return f"no two widths have {metric}."
    widths = sorted({step.narrow for step in steps} | {step.wide for step in steps})
    of = {(step.narrow, step.wide): step for step in steps}
    follow = [of[pair] for pair in pairwise(widths) if pair in of]
    if all(step.half is None for step in steps):
        told = "; ".join(step.words() for step in follow)
        return f"{metric} from {told}. No seeds repeat these differences, so none is told from their noise."
    enough = next(w for w in widths if not any(step.grows for step in steps if step.narrow == w))
    gains = [step for step in steps if step.narrow < enough and step.grows]
    grown = f"grows up to {enough} beams ({max(gains, key=lambda step: (step.narrow, -step.wide)).words()})" if gains else ""
    wider = [step for step in steps if step.narrow == enough]
    if not wider:
        return f"{metric} {grown}, the widest measured: where more stops paying was not reached."
    beyond = max(wider, key=lambda step: (step.half is not None, step.wide))  # a width that one seed has by now tells nothing
    narrow, wide = (next(m for m in measured if m["beams"] == beams) for beams in (enough, beyond.wide))
    price = _price(narrow["infer_flops_per_user"], wide["infer_flops_per_user"])
    if grown:
        change = f"{grown}, then {'falls' if beyond.falls else 'no more beyond noise'}"
    else:
        change = f"{'falls' if beyond.falls else 'does not grow beyond noise'} from {enough} beams, the fewest measured"
    return f"{metric} {change} ({beyond.words()}){price}. {_conclusion(beyond, narrow['mean'], worthwhile)}"


def _conclusion(beyond: Step, level: float, worthwhile: float) -> str:
    """A gain that was not shown is not yet none: what counts is the largest that the interval leaves, beside what would be worth
    paying for."""
    most = beyond.mean + (beyond.half or 0.0)
    if level and beyond.half is not None and most <= worthwhile * math.log2(beyond.wide / beyond.narrow) * level:
        return f"More than {beyond.narrow} beams do not pay: {most / level:+.1%} at most, under {worthwhile:.3g} per doubling."
    left = "" if beyond.half is None or not level else f": {beyond.seeds} seeds leave room for {most / level:+.1%}"
    return f"Whether more than {beyond.narrow} beams pay is open{left}."


def _price(narrow: float | None, wide: float | None) -> str:
    return f" for {wide / narrow:.1f} times the FLOPs" if narrow and wide else ""


def _width(rows: list[Row], beams: int, metric: str) -> dict[str, Any]:
    own = [row for row in rows if row["beams"] == beams]
    values = [float(row[metric]) for row in own if row.get(metric) is not None]
    return {
        "beams": beams,
        "seeds": len(own),
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "users_per_second": _mean(own, "users_per_second"),
        "infer_flops_per_user": _mean(own, "infer_flops_per_user"),
    }


def _difference(step: Step) -> dict[str, Any]:
    low, high = (None, None) if step.half is None else (step.mean - step.half, step.mean + step.half)
    found = {"from": step.narrow, "to": step.wide, "seeds": step.seeds, "mean": step.mean, "low": low, "high": high}
    return found | ({"users_low": step.users.low, "users_high": step.users.high} if step.users else {})


def _mean(rows: list[Row], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return float(np.mean(values)) if values else None
