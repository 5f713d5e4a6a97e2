"""`next_experiment`: which of these runs would teach most for its cost?

Locally c-optimal design (Chernoff 1953; Atkinson, Donev and Tobias 2007, ch. 10 and 17): the law is linearised about the fit, so
that a target's variance is s^2 c'(J'J)^-1 c, and a candidate's runs add their rows to J.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fit.allocation import doubts
from fit.errors import FitError
from fit.fitting import fit_law
from fit.problem import LOSSES
from fit.result import FitResult, finite
from fit.tables import Floats, TableLike, numbers, read_table, sizes
from fit.verdict import saturation

_DRAWS = 200  # enough for a share of draws to 3%


@dataclass(frozen=True)
class Candidate:
    """What ``runs`` runs at ``sizes`` would do. ``before`` and ``after``: the target's standard error, in its unit.

    ``shrinks``: 1 - after/before; ``per_cost``: that over ``cost``, the cost of all the runs. ``support``: the share of the
    bootstrap's draws under which this candidate is the best for its cost. ``distance``: beyond the sizes that were fitted, in
    units of their logarithmic range.
    """

    sizes: dict[str, float]
    runs: int
    cost: float
    before: float
    after: float
    shrinks: float
    per_cost: float
    support: float | None
    distance: float


@dataclass(frozen=True)
class NextExperiment:
    """``rows`` in the order of the candidates; ``target``: `slope`, or the sizes of a prediction."""

    target: str | dict[str, float]
    rows: tuple[Candidate, ...]
    warnings: tuple[str, ...]

    @property
    def best(self) -> Candidate:
        """The candidate that shrinks the target's error most per cost."""
        return max(self.rows, key=lambda row: row.per_cost)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        rows = [
            {name: finite(value) if isinstance(value, float) else value for name, value in vars(row).items()} for row in self.rows
        ]
        return {"target": self.target, "best": self.rows.index(self.best), "rows": rows, "warnings": list(self.warnings)}


def next_experiment(
    table: TableLike,
    law: str,
    columns: Mapping[str, str],
    candidates: TableLike,
    target: Mapping[str, float] | str = "slope",
    cost: str = "cost",
    runs: int = 1,
    loss: str = "log-huber",
    delta: float | None = None,
    bootstrap: int = _DRAWS,
    seed: int = 0,
    cluster: str = "auto",
) -> NextExperiment:
    """Ranks the ``candidates`` by how far ``runs`` runs at each would shrink the target's standard error, per unit of cost.

    ``candidates``: a table of sizes, in columns named as in ``columns`` or as in the law; its column ``cost`` is what one run
    costs (without it, all cost 1). ``target``: sizes, such as ``{"N": 1e9}``, whose predicted mean is wanted, or `slope`: the
    gain per doubling over the top sizes, which the saturation verdict is about (laws of one size; a new largest size takes the
    place of the smallest of the top ones, one among them joins them). The other arguments are those of `fit_law`; the draws show
    whether the ranking would stand were the law's parameters others that fit.

    Raises FitError for a table that has no fit, or no verdict for `slope`, and for candidates without a size or a positive cost.
    """
    result = fit_law(table, law, columns, loss, delta, bootstrap=bootstrap, seed=seed, cluster=cluster)
    rows, choices = read_table(table), read_table(candidates)
    if runs < 1:
        raise FitError(f"runs {runs} must be 1 or more")
    have = {role: sizes(rows, columns[role], role) for role in result.definition.sizes}
    offered = {role: _column(choices, columns[role], role) for role in have}
    costs = runs * (sizes(choices, cost, "the cost") if cost in choices.column_names else np.ones(choices.num_rows))
    if isinstance(target, str):
        if target != "slope":
            raise FitError(f"unknown target {target!r}; slope, or sizes such as {{'N': 1e9}}")
        y = numbers(rows, columns[result.definition.response], result.definition.response)
        errors = _slope_errors(result, have, y, offered, runs)[None]
    else:
        errors = _prediction_errors(result, have, offered, _target(result, target), runs)
    with np.errstate(invalid="ignore", divide="ignore"):
        shrinks = np.nan_to_num(1 - errors[:, 1:] / errors[:, :1])
    return NextExperiment(
        target if isinstance(target, str) else dict(target),
        _rows(result, offered, costs, runs, errors[0], shrinks),
        tuple(doubts(result)),
    )


def _column(table: Any, name: str, role: str) -> Floats:
    return sizes(table, role if name not in table.column_names and role in table.column_names else name, role)


def _target(result: FitResult, target: Mapping[str, float]) -> dict[str, Floats]:
    if set(target) != set(result.definition.sizes) or not all(0 < value < np.inf for value in target.values()):
        raise FitError(f"target {dict(target)}: law {result.law} needs {', '.join(result.definition.sizes)}, each above zero")
    return {role: np.array([value], dtype=np.float64) for role, value in target.items()}


def _rows(
    result: FitResult, offered: Mapping[str, Floats], costs: Floats, runs: int, errors: Floats, shrinks: Floats
) -> tuple[Candidate, ...]:
    per_cost = shrinks / costs
    best = np.argmax(per_cost[1:], axis=1)
    distance = result.predict(dict(offered)).distance
    return tuple(
        Candidate(
            sizes={role: float(values[i]) for role, values in offered.items()},
            runs=runs,
            cost=float(costs[i]),
            before=float(errors[0]),
            after=float(errors[1 + i]),
            shrinks=float(shrinks[0, i]),
            per_cost=float(per_cost[0, i]),
            support=float(np.mean(best == i)) if len(best) else None,
            distance=float(distance[i]),
        )
        for i in range(len(costs))
    )


def _prediction_errors(
    result: FitResult, have: Mapping[str, Floats], offered: Mapping[str, Floats], target: Mapping[str, Floats], runs: int
) -> Floats:
    """(1 + draws, 1 + candidates): the error of the predicted mean now, and with each candidate, at the fit and at each draw."""
    n, count = len(next(iter(have.values()))), len(next(iter(offered.values())))
    logs = {role: np.log(np.concatenate([have[role], offered[role], target[role]])) for role in have}
    p = np.array([list(result.params.values()), *result.draws[:_DRAWS]])
    J, fitted = _jacobian(result, logs, p)
    log = LOSSES[result.loss] == "log"
    if log:
        J = J / fitted[:, :, None]
    out = np.empty((len(p), 1 + count))
    for d in range(len(p)):
        free = _free(result, J[d, :n])
        rows = J[d][:, free]
        unit = result.noise[0] * (abs(fitted[d, -1]) if log else 1.0)
        out[d] = unit * _errors(rows[:n], rows[n:-1], rows[-1], runs)
    return out


def _jacobian(result: FitResult, logs: Mapping[str, Floats], p: Floats) -> tuple[Floats, Floats]:
    """Derivative of the metric by the parameters (draws, rows, params), and the metric (draws, rows)."""
    law = result.definition
    m, n = len(law.terms), len(next(iter(logs.values())))
    theta = p[:, m:].copy()
    for i, t in enumerate(law.thetas):
        if t.kind == "break":
            theta[:, i] = np.log(theta[:, i])
    J = np.zeros((len(p), n, p.shape[1]))
    for j, jet in enumerate(law.jets(logs, theta)):
        J[:, :, j] = jet.value
        for i, slope in jet.first.items():
            J[:, :, m + i] += p[:, j, None] * slope
    return J, np.einsum("drj,dj->dr", J[:, :, :m], p[:, :m])


def _free(result: FitResult, J: Floats) -> NDArray[np.bool_]:
    """(params,): those that are estimated, by rows J (rows, params): not fixed, and of some effect on the rows that are there.

    One at a bound counts as free: that a floor is 0 by these runs is no certainty about the next.
    """
    law = result.definition
    fixed = np.array([t.lower == t.upper for t in law.terms] + [t.lower == t.upper for t in law.thetas])
    return np.asarray(~fixed & np.isfinite(J).all(axis=0) & (np.abs(J).max(axis=0) > 0))


def _errors(J: Floats, candidates: Floats, c: Floats, runs: int) -> Floats:
    """(1 + candidates,): the standard error of c'p for noise of 1, from the rows J (rows, params), and with each candidate's."""
    if not J.shape[1]:
        return np.zeros(1 + len(candidates))
    norms = np.maximum(np.linalg.norm(J, axis=0), 1e-300)
    # The ridge stands for what the rows leave wholly open: an error that is huge, yet shrinks when a candidate closes it.
    R = np.linalg.qr(np.concatenate([J / norms, 1e-8 * np.eye(len(norms))])).R
    u = np.linalg.solve(R.T, c / norms)
    z = np.linalg.solve(R.T, (candidates / norms).T)
    now = float(u @ u)
    after = now - runs * (u @ z) ** 2 / (1 + runs * np.sum(z**2, axis=0))  # Sherman and Morrison 1950
    return np.sqrt(np.maximum([now, *after], 0.0))


def _slope_errors(result: FitResult, have: Mapping[str, Floats], y: Floats, offered: Mapping[str, Floats], runs: int) -> Floats:
    """(1 + candidates,): the error of the gain per doubling over the top sizes, now and with each candidate."""
    if len(have) != 1:
        raise FitError(f"law {result.law} has sizes {', '.join(have)}; a slope for the verdict needs a law of one")
    N, choices = next(iter(have.values())), next(iter(offered.values()))
    verdict = saturation({"N": N, "R": y}, {"N": "N", "R": "R"})
    noise = result.noise[0] * (verdict.level if LOSSES[result.loss] == "log" else 1.0)
    x, top = np.log2(N), np.log2(verdict.top_sizes)
    out = [_slope_error(x[x >= top[0] - 1e-9])]
    for new in np.log2(choices):
        least = top[1] if new > top[-1] + 1e-9 else top[0]
        rows = np.concatenate([x, np.full(runs, new)])
        out.append(_slope_error(rows[rows >= least - 1e-9]))
    return noise * np.array(out)


def _slope_error(x: Floats) -> float:
    """Of a line's slope over x, for noise of 1."""
    return float(1 / np.sqrt(np.sum((x - x.mean()) ** 2)))
