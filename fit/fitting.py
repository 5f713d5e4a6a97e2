"""`fit_law`: a law fitted to a table, with intervals and warnings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fit.errors import FitError
from fit.laws import Law, law_named
from fit.solve import AT_OPTIMUM, LOSSES, Problem, Solution, solve
from fit.tables import Floats, TableLike, labels, numbers, read_table, rungs, sizes
from fit.uncertainty import (
    PARAM_LEVEL,
    Design,
    by_residuals,
    by_rows,
    by_seeds,
    dead_exponents,
    extrapolation,
    margins,
    standard_errors,
    tail,
    unidentified,
)
from fit.verdict import Saturation, saturation

DEFAULT_DELTA = 1e-3  # Hoffmann et al. 2022, appendix D.2


@dataclass(frozen=True)
class Prediction:
    """Of the law's mean, (rows,) each; ``low`` and ``high`` are None without bootstrap draws."""

    value: Floats
    low: Floats | None
    high: Floats | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class FitResult:
    """A fitted law.

    ``objective`` is summed over the ``n`` rows (least squares: the sum of squares). ``intervals`` are 95% percentile intervals of
    ``draws`` (bootstrap, parameters in the order of ``params``), expanded for few replicates; empty without a bootstrap.
    ``gradient`` is the scaled projected gradient at the result, ``starts`` how many of the search's starts reached it.
    """

    law: str
    params: dict[str, float]
    objective: float
    n: int
    loss: str
    delta: float | None
    draws: Floats
    intervals: dict[str, tuple[float, float]]
    warnings: tuple[str, ...]
    columns: dict[str, str]
    sizes: dict[str, tuple[float, float]]
    """Least and largest fitted size of each role."""
    condition: float
    gradient: float
    starts: tuple[int, int]
    bootstrap: dict[str, Any] = field(default_factory=dict)
    """How the draws were made: ``method`` (rows, seeds or residuals), ``draws``, ``seed``, ``dof``."""
    saturation: Saturation | None = None

    def predict(self, table: TableLike, interval: float = 0.9) -> Prediction:
        """The law's mean at the sizes of ``table``, with a percentile interval of the draws' curves.

        Sizes are read from the columns of the fit, or from columns named as in the law (N, D).
        """
        if not 0 < interval < 1:
            raise FitError(f"interval {interval} is not between 0 and 1, such as 0.9")
        law, rows = law_named(self.law), read_table(table)
        values = {}
        for role in law.sizes:
            name = self.columns[role]
            values[role] = sizes(rows, name if name in rows.column_names or role not in rows.column_names else role, role)
        logs = {role: np.log(v) for role, v in values.items()}
        curves = _evaluate(law, np.array([list(self.params.values()), *self.draws]), logs)
        low = high = None
        if len(self.draws):
            share = tail(interval, self.bootstrap["dof"])
            low, high = np.quantile(curves[1:], [share, 1 - share], axis=0)
        beyond = extrapolation(values, self.sizes)
        return Prediction(curves[0], low, high, (f"extrapolates:{beyond:.1f}x",) if beyond > 1.0 + 1e-9 else ())

    @property
    def aicc(self) -> float | None:
        """Small-sample Akaike criterion under normal noise (Hurvich and Tsai 1989); None for a robust loss or too few rows."""
        k = len(self.params) + 1
        if self.loss != "least-squares" or self.n - k - 1 <= 0 or self.objective <= 0:
            return None
        return float(self.n * np.log(self.objective / self.n) + 2 * k + 2 * k * (k + 1) / (self.n - k - 1))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; intervals are absent where nothing was bootstrapped."""
        params = {
            name: {"value": value} | ({"low": self.intervals[name][0], "high": self.intervals[name][1]} if self.intervals else {})
            for name, value in self.params.items()
        }
        out: dict[str, Any] = {
            "law": self.law,
            "formula": law_named(self.law).formula,
            "params": params,
            "objective": self.objective,
            "n": self.n,
            "loss": self.loss,
            "delta": self.delta,
            "aicc": self.aicc,
            "warnings": list(self.warnings),
            "columns": self.columns,
            "sizes": {role: list(span) for role, span in self.sizes.items()},
            "condition": self.condition,
            "gradient": self.gradient,
            "starts": list(self.starts),
        }
        if self.bootstrap:
            out["bootstrap"] = {**self.bootstrap, "level": PARAM_LEVEL}
        if self.saturation is not None:
            out["saturation"] = self.saturation.to_json()
        return out


def _evaluate(law: Law, p: Floats, logs: Mapping[str, Floats]) -> Floats:
    m = len(law.terms)
    return np.asarray(np.einsum("brm,bm->br", law.basis(logs, p[:, m:]), p[:, :m]))


def fit_law(
    table: TableLike,
    law: str,
    columns: Mapping[str, str],
    loss: str = "log-huber",
    delta: float | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str = "auto",
) -> FitResult:
    """Fits a law to a table of (sizes, metric).

    ``table``: a pyarrow Table, a mapping of arrays, or a path (.csv, .parquet, .jsonl, a folder of .parquet). ``columns``: the
    law's sizes and metric by their names in the table, such as ``{"N": "params", "L": "loss"}``. ``loss``: `log-huber` and `l1`
    are of log residuals, `huber` and `least-squares` of plain ones. ``delta``: where Huber turns from square to absolute, in the
    residual's unit; by default 1e-3, for `huber` 1e-3 of the median metric.

    ``bootstrap``: the number of draws for the intervals. ``cluster``: a column of replicates such as `seed`, which are drawn
    within each size; `rows` draws rows; by default the column `seed` where there is one, else rows. One replicate at every size
    leaves only the residuals to draw (warning `seeds:1`).

    Raises FitError (a ValueError) in one line for anything the table cannot carry. What it can but doubtfully is in
    ``.warnings``.
    """
    which = law_named(law)
    _check(which, columns, loss, delta, bootstrap)
    rows = read_table(table)
    values = {role: sizes(rows, columns[role], role) for role in which.sizes}
    y = numbers(rows, columns[which.response], which.response)
    rung = rungs(list(values.values()))
    _carries(which, columns, y, rung, loss)

    centres = {role: float(np.mean(np.log(v))) for role, v in values.items()}
    scale = float(np.median(np.abs(y))) or float(np.max(np.abs(y)))
    problem = Problem(
        which,
        {role: np.log(v) - centres[role] for role, v in values.items()},
        y / scale,
        np.ones(len(y)),
        loss,
        _scaled_delta(loss, delta, scale),
    )
    best = solve(problem)
    design, method = _design(rows, rung, cluster)
    draws = np.empty((0, len(which.params)))
    if bootstrap:
        draws = _draws(problem, best, design, method, bootstrap, seed)
    dof = {"seeds": design.dof, "residuals": len(y) - len(which.params), "rows": None}[method]
    warnings = _warnings(which, columns, problem, best, y, rung, margins(problem, best.p, draws, dof if bootstrap else None))
    if bootstrap and method == "residuals":
        warnings.append("seeds:1")
    factor = {"least-squares": scale**2, "huber": scale**2}.get(loss, 1.0)
    params = dict(zip(which.params, map(float, which.unscale(best.p, centres, scale)), strict=True))
    plain = which.unscale(draws, centres, scale)
    return FitResult(
        law=law,
        params=params,
        objective=best.objective * factor,
        n=len(y),
        loss=loss,
        delta=problem.delta * (scale if loss == "huber" else 1.0) if np.isfinite(problem.delta) else None,
        draws=plain,
        intervals=_intervals(which, plain, dof),
        warnings=tuple(warnings),
        columns=dict(columns),
        sizes={role: (float(v.min()), float(v.max())) for role, v in values.items()},
        condition=standard_errors(problem, best.p)[1],
        gradient=best.gradient,
        starts=(best.agreeing, best.starts),
        bootstrap={"method": method, "draws": bootstrap, "seed": seed, "dof": dof} if bootstrap else {},
        saturation=_saturation(which, values, y),
    )


def _check(law: Law, columns: Mapping[str, str], loss: str, delta: float | None, bootstrap: int) -> None:
    needed = {*law.sizes, law.response}
    if set(columns) != needed:
        got = ", ".join(sorted(columns)) or "none"
        raise FitError(f"law {law.name} ({law.formula}) needs columns {', '.join([*law.sizes, law.response])}; got {got}")
    if loss not in LOSSES:
        raise FitError(f"unknown loss {loss!r}; there are {', '.join(LOSSES)}")
    if delta is not None and (loss not in ("log-huber", "huber") or not 0 < delta < np.inf):
        raise FitError(f"delta {delta} does not fit loss {loss}: it is a positive number for log-huber and huber only")
    if bootstrap < 0:
        raise FitError(f"bootstrap {bootstrap} is negative; 0 for none, or a number of draws such as 1000")


def _carries(law: Law, columns: Mapping[str, str], y: Floats, rung: np.ndarray, loss: str) -> None:
    count, needed = len(np.unique(rung)), len(law.params)
    if count < needed:
        raise FitError(f"law {law.name} has {needed} parameters; {count} distinct size{'s' * (count != 1)} cannot carry it")
    metric = columns[law.response]
    if np.ptp(y) == 0:
        raise FitError(f"column {metric!r}: every value is {y[0]:g}; a constant metric has no law")
    if y.min() < 0 and all(term.lower == 0 for term in law.terms):
        row = int(np.argmax(y < 0))
        raise FitError(f"column {metric!r}, row {row + 1}: {y[row]:g}; law {law.name} ({law.formula}) has no values below zero")
    if LOSSES[loss] == "log" and y.min() <= 0:
        row = int(np.argmax(y <= 0))
        raise FitError(
            f"column {metric!r}, row {row + 1}: {y[row]:g} has no logarithm for loss {loss}; use huber or least-squares"
        )


def _scaled_delta(loss: str, delta: float | None, scale: float) -> float:
    if loss == "log-huber":
        return delta or DEFAULT_DELTA
    if loss == "huber":
        return delta / scale if delta else DEFAULT_DELTA
    return float("inf")


def _design(rows: Any, rung: np.ndarray, cluster: str) -> tuple[Design, str]:
    if cluster == "rows" or (cluster == "auto" and "seed" not in rows.column_names):
        return Design(rung), "rows"
    design = Design(rung, labels(rows, "seed" if cluster == "auto" else cluster))
    return design, "seeds" if design.dof else "residuals"


def _draws(problem: Problem, best: Solution, design: Design, method: str, count: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    if method == "residuals":
        resamples = by_residuals(problem, best.p, count, rng)
    else:
        resamples = (by_seeds if method == "seeds" else by_rows)(problem, design, count, rng)
    return np.array([solve(drawn, warm=best.p).p for drawn in resamples])


def _intervals(law: Law, draws: Floats, dof: int | None) -> dict[str, tuple[float, float]]:
    if not len(draws):
        return {}
    share = tail(PARAM_LEVEL, dof)
    low, high = np.quantile(draws, [share, 1 - share], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(law.params)}


def _warnings(
    law: Law,
    columns: Mapping[str, str],
    problem: Problem,
    best: Solution,
    y: Floats,
    rung: np.ndarray,
    margin: tuple[Floats, Floats],
) -> list[str]:
    lower, upper = problem.bounds
    dead = dead_exponents(law, best.p)
    out = []
    if names := unidentified(law, best.p, *margin, float(np.ptp(problem.y))):
        out.append("unidentified:" + ",".join(names))
    if names := [n for i, n in enumerate(law.params) if best.p[i] in (lower[i], upper[i]) and not dead[i]]:
        out.append("bound:" + ",".join(names))
    if best.agreeing * 2 < best.starts:
        out.append(f"start:{best.agreeing}/{best.starts}")
    if best.gradient > AT_OPTIMUM[problem.loss]:
        out.append(f"not-optimal:{best.gradient:.0e}")
    if len(np.unique(rung)) == len(law.params):
        out.append(f"no-spare-sizes:{len(law.params)}")
    if float(np.max(np.abs(problem.residuals(best.p)))) < 1e-9:
        out.append("perfect")
    if law.response == "R" and y.max() > 1:
        out.append(f"percent:{columns['R']}")
    return out


def _saturation(law: Law, values: Mapping[str, Floats], y: Floats) -> Saturation | None:
    """The verdict that goes with a law of one size; None where the sizes are too few for one or the law has several."""
    if law.sizes != ("N",):
        return None
    try:
        return saturation({"N": values["N"], law.response: y}, {"N": "N", law.response: law.response})
    except FitError:
        return None
