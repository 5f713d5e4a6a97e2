"""`leave_largest_out`: how well would this law have predicted the sizes that were not there yet?

Rolling-origin evaluation (Tashman 2000, Int. J. Forecasting 16:437) with size in the place of time. Random folds would fill gaps
between neighbours, which any smooth curve does well; a scaling law is bought for what lies beyond its largest size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fit.errors import FitError
from fit.fitting import FitResult, fit_law
from fit.laws import Law, constrained, law_named
from fit.tables import Floats, TableLike, numbers, read_table, rungs, sizes


@dataclass(frozen=True)
class HeldOut:
    """One size predicted by a fit to smaller ones.

    ``observed`` is the mean of its ``runs``; ``error`` is predicted/observed - 1, ``naive`` the same for 'as at the largest
    fitted size'. ``low`` and ``high`` bound a new run, ``covered`` is the share of the runs within (None without a bootstrap).
    ``distance``: how far beyond the fitted sizes, in units of the logarithmic range that they span (infinite where a size moves
    that was still in the fit). ``steps``: 1 for the next larger size.
    """

    fitted: int
    sizes: dict[str, float]
    steps: int
    runs: int
    observed: float
    predicted: float
    low: float | None
    high: float | None
    covered: float | None
    error: float
    naive: float
    distance: float

    def to_json(self) -> dict[str, Any]:
        values = dict(vars(self))
        return values | {"distance": self.distance if np.isfinite(self.distance) else None}


@dataclass(frozen=True)
class Holdout:
    """Every prediction of a rolling leave-largest-out. ``by``: what the sizes are ordered by; ``failed``: fits that could not be
    made, by the number of sizes they would have had."""

    law: str
    columns: dict[str, str]
    loss: str
    interval: float
    by: str
    rows: tuple[HeldOut, ...]
    failed: dict[int, str]

    @property
    def next(self) -> tuple[HeldOut, ...]:
        """The predictions of the next larger size only: each size once, so the nearest to independent."""
        return tuple(row for row in self.rows if row.steps == 1)

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error of all predictions."""
        return float(np.mean([abs(row.error) for row in self.rows]))

    @property
    def next_error(self) -> float:
        """Mean absolute relative error one size ahead."""
        return float(np.mean([abs(row.error) for row in self.next]))

    @property
    def naive_error(self) -> float:
        """What 'as at the largest fitted size' would have had one size ahead; a law that is no better predicts nothing."""
        return float(np.mean([abs(row.naive) for row in self.next]))

    @property
    def bias(self) -> float:
        """Mean relative error with its sign: above zero where the law predicted more than came."""
        return float(np.mean([row.error for row in self.rows]))

    @property
    def coverage(self) -> float | None:
        """Share of the held-out runs, over all predictions, within their interval; None without a bootstrap."""
        return _coverage(self.rows)

    @property
    def next_coverage(self) -> float | None:
        """As `coverage`, one size ahead."""
        return _coverage(self.next)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "law": self.law,
            "columns": self.columns,
            "loss": self.loss,
            "by": self.by,
            "interval": self.interval,
            "mean_error": self.mean_error,
            "next_error": self.next_error,
            "naive_error": self.naive_error,
            "bias": self.bias,
            "coverage": self.coverage,
            "next_coverage": self.next_coverage,
            "rows": [row.to_json() for row in self.rows],
            "failed": {str(k): why for k, why in self.failed.items()},
        }


def _coverage(rows: tuple[HeldOut, ...]) -> float | None:
    known = [(row.covered, row.runs) for row in rows if row.covered is not None]
    return float(np.average([c for c, _ in known], weights=[n for _, n in known])) if known else None


def leave_largest_out(
    table: TableLike,
    law: str,
    columns: Mapping[str, str],
    loss: str = "log-huber",
    delta: float | None = None,
    bootstrap: int = 400,
    seed: int = 0,
    cluster: str = "auto",
    interval: float = 0.9,
    by: str | None = None,
    least: int | None = None,
    fits: int = 8,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    fixed: Mapping[str, float] | None = None,
    weights: str | None = None,
) -> Holdout:
    """Fits the law to the k smallest sizes and predicts every larger one, for growing k.

    ``by``: the column that orders the sizes (such as FLOPs), by default the law's size, or the product of its sizes where it has
    several. ``least``: the fewest distinct sizes to fit, by default one more than the law has free parameters. ``fits``: at most
    so many k, evenly spread. The other arguments are those of `fit_law`; ``bootstrap=0`` leaves out intervals and coverage.

    Raises FitError where no size is left to predict, where a held-out metric is zero (it has no relative error), and where no fit
    can be made at all.
    """
    if not 0 < interval < 1:
        raise FitError(f"interval {interval} is not between 0 and 1, such as 0.9")
    if fits < 1:
        raise FitError(f"fits {fits} must be 1 or more")
    which, rows = constrained(law_named(law), bounds or {}, fixed or {}), read_table(table)
    _columns(which, columns)
    values = {role: sizes(rows, columns[role], role) for role in which.sizes}
    y = numbers(rows, columns[which.response], which.response)
    order, name = _order(rows, values, by)
    free = sum(t.lower < t.upper for t in which.terms) + sum(t.lower < t.upper for t in which.thetas)
    least = free + 1 if least is None else least
    cuts = _cuts(order, rungs(list(values.values())), max(least, 1), fits)
    found: list[HeldOut] = []
    failed: dict[int, str] = {}
    for k in cuts:
        inside = order < k
        try:
            smaller = rows.filter(pa.array(inside.tolist()))
            result = fit_law(smaller, law, columns, loss, delta, bootstrap, seed, cluster, bounds, fixed, weights)
        except FitError as error:
            failed[k] = str(error)
            continue
        found += [_predicted(result, values, y, order, k, r, interval) for r in range(k, order.max() + 1)]
    if not found:
        raise FitError(f"no fit to the smaller sizes could be made; with {cuts[-1]} sizes: {failed[cuts[-1]]}")
    return Holdout(law, dict(columns), loss, interval, name, tuple(found), failed)


def _columns(law: Law, columns: Mapping[str, str]) -> None:
    missing = [role for role in (*law.sizes, law.response) if role not in columns]
    if missing:
        raise FitError(f"law {law.name} ({law.formula}) needs columns {', '.join([*law.sizes, law.response])}; no {missing[0]}")


def _order(rows: pa.Table, values: Mapping[str, Floats], by: str | None) -> tuple[NDArray[np.intp], str]:
    """(rows,) rank of each row's size, equal sizes sharing one; and its name."""
    if by is not None and by not in values:
        return rungs([sizes(rows, by, "by")]), by
    roles = [by] if by is not None else list(values)
    return rungs([np.exp(np.sum([np.log(values[role]) for role in roles], axis=0))]), "*".join(roles)


def _cuts(order: NDArray[np.intp], design: NDArray[np.intp], least: int, fits: int) -> list[int]:
    """The ranks before which to cut: at least ``least`` distinct sizes before, one after."""
    first = np.unique(design, return_index=True)[1]
    ahead = np.sort([order[design == design[i]].min() for i in first])
    top = int(order.max())
    lowest = int(ahead[least - 1]) + 1 if len(ahead) >= least else top + 1
    if lowest > top:
        raise FitError(f"{len(first)} distinct sizes; leave-largest-out needs {least} to fit and a larger one to predict")
    return sorted({int(k) for k in np.linspace(lowest, top, min(fits, top - lowest + 1)).round()})


def _predicted(
    result: FitResult,
    values: Mapping[str, Floats],
    y: Floats,
    order: NDArray[np.intp],
    k: int,
    rank: int,
    interval: float,
) -> HeldOut:
    """Of all rows of one rank: its runs, which share their order but, under `by`, not always every size."""
    out = order == rank
    observed = float(y[out].mean())
    if observed == 0:
        raise FitError(f"row {int(np.argmax(out)) + 1}: the metric is 0, of which there is no relative error")
    prediction = result.predict({result.columns[role]: v[out] for role, v in values.items()}, interval, new_run=True)
    predicted = float(prediction.value.mean())
    low = high = covered = None
    if prediction.low is not None and prediction.high is not None:
        low, high = float(prediction.low.mean()), float(prediction.high.mean())
        covered = float(np.mean((prediction.low <= y[out]) & (y[out] <= prediction.high)))
    where = {role: float(np.exp(np.log(v[out]).mean())) for role, v in values.items()}
    return HeldOut(
        fitted=k,
        sizes=where,
        steps=rank - k + 1,
        runs=int(out.sum()),
        observed=observed,
        predicted=predicted,
        low=low,
        high=high,
        covered=covered,
        error=predicted / observed - 1,
        naive=float(y[order == k - 1].mean()) / observed - 1,
        distance=float(prediction.distance.max()),
    )
