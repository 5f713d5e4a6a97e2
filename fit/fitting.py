"""`fit_law`: a law fitted to a table, with intervals and warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fit.errors import FitError
from fit.group_search import resample_groups
from fit.groups import check_groups, design_warnings, group_law, group_logs, objectives, ranges, read_groups
from fit.identify import collinear, dead_thetas, hold_lost, reduced, standard_errors, terms, unidentified
from fit.laws import Law, constrained, law_named
from fit.problem import LOSSES, Problem
from fit.replicates import row_weights
from fit.result import FitResult, Prediction
from fit.solve import AT_OPTIMUM, Solution, solve, solve_tables
from fit.tables import Floats, TableLike, labels, numbers, read_table, rungs, sizes
from fit.uncertainty import METHODS, PARAM_LEVEL, Design, ends, margins, noise, resample, run_spread
from fit.verdict import Saturation, saturation

DEFAULT_DELTA = 1e-3  # Hoffmann et al. 2022, appendix D.2


def fit_law(
    table: TableLike,
    law: str,
    columns: Mapping[str, str],
    loss: str = "log-huber",
    delta: float | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str = "auto",
    bounds: Mapping[str, tuple[float, float]] | None = None,
    fixed: Mapping[str, float] | None = None,
    weights: str | None = None,
    groups: str | None = None,
    shared: Sequence[str] = (),
    worthwhile: float = 0.01,
) -> FitResult:
    """Fits a law to a table of (sizes, metric).

    ``table``: a pyarrow Table, a mapping of arrays, or a path (.csv, .parquet, .jsonl, a folder of .parquet). ``law``: a name of
    `fit.laws.LAWS` or a formula such as ``"E + A/N**a"``. ``columns``: the law's sizes and metric by their names in the table,
    such as ``{"N": "params", "L": "loss"}``. ``loss``: `log-huber` and `l1` are of log residuals, `huber` and `least-squares` of
    plain ones. ``delta``: where Huber turns from square to absolute, in the residual's unit; by default 1e-3, for `huber` 1e-3 of
    the median metric.

    ``bootstrap``: the number of draws for the intervals. ``cluster``: what is drawn: of a column of replicates such as `seed`,
    their deviations from their size's mean, about the law; `rows`; `sizes` (all rows of a size together); `residuals` about the
    law; `parametric`, normal noise about it; by default the column `seed` where there is one, else rows. One replicate at every
    size leaves only the residuals to draw (warning `seeds:1`).

    ``bounds``, ``fixed``: of parameters, in the table's units. ``weights``: a column of weights above zero,
    or `replicates`: each size by the reciprocal of its runs' variance, moderated (see `fit.replicates`; draws keep them).

    ``groups``: a column; the law is fitted to each of its groups at once, the parameters in ``shared`` being one number for all
    of them and every other one each group's own, named ``A[group]`` (in ``bounds`` and ``fixed`` too, where ``A`` is every
    group's). ``FitResult.group`` gives one group's law.

    ``worthwhile``: the least relative gain per doubling that the verdict on saturation counts as one, see `saturation`.

    Raises FitError (a ValueError) in one line for anything the table cannot carry. What it can but doubtfully is in
    ``.warnings``.
    """
    base = law_named(law)
    _check(base, columns, loss, delta, bootstrap)
    if not 0 < worthwhile < 1:
        raise FitError(f"worthwhile {worthwhile} is no share; 0.01 is one per cent per doubling")
    if shared and groups is None:
        raise FitError(f"shared: {', '.join(shared)} can be shared between groups only; name the column that makes them (groups)")
    rows = read_table(table)
    values = {role: sizes(rows, columns[role], role) for role in base.sizes}
    y = numbers(rows, columns[base.response], base.response)
    logs: dict[str, Floats] = {role: np.log(v) for role, v in values.items()}
    rung = list(values.values())
    if groups is None:
        made = None
        which, lost = hold_lost(constrained(base, bounds or {}, fixed or {}), values)
    else:
        made = read_groups(rows, groups, base, shared)
        which, lost = group_law(base, values, made, bounds or {}, fixed or {})
        logs, rung = group_logs(logs, made), [*rung, made.member.astype(np.float64) + 1.0]
    design, method = _design(rows, rungs(rung), cluster)
    problem = _problem(which, logs, y, loss, delta, row_weights(rows, weights, y, design, LOSSES[loss] == "log"))
    if made:
        check_groups(problem, made, design, columns[base.response])
    _carries(which, columns, y, design, problem)
    best = solve(problem)
    draws = np.empty((0, len(which.params)))
    if bootstrap:
        drawn = (
            resample_groups(problem, best.p, made, design, method, bootstrap, seed)
            if made
            else resample(problem, best.p, design, method, bootstrap, seed)
        )
        draws = solve_tables(drawn, best.p)
    spread = run_spread(problem, best.p, design, method)
    dof = spread.dof if method in ("seeds", "residuals", "parametric") else None
    low, high = margins(problem, best.p, draws, dof if bootstrap else None)
    parts = terms(problem, best.p, low)
    open_ = unidentified(problem, best.p, low, high, lost)
    warnings = _warnings(columns, problem, best, y, design)
    warnings += _identity_warnings(parts, open_, design_warnings(problem, lost) if made else _of_design(values, lost))
    if bootstrap and method == "residuals":
        warnings.append("seeds:1")
    plain = problem.plain(draws)
    factor = problem.scale**2 if loss in ("least-squares", "huber") else 1.0
    return FitResult(
        law=law,
        params=dict(zip(which.params, map(float, problem.plain(best.p[None])[0]), strict=True)),
        objective=best.objective * factor,
        n=len(y),
        loss=loss,
        delta=problem.delta * (problem.scale if loss == "huber" else 1.0) if np.isfinite(problem.delta) else None,
        draws=plain,
        intervals=_intervals(which, plain, dof),
        warnings=tuple(warnings),
        columns=dict(columns),
        sizes={role: (float(v.min()), float(v.max())) for role, v in values.items()},
        residuals=problem.residuals(best.p[None])[0] * (1.0 if problem.log else problem.scale),
        noise=_noise(problem, best.p, design),
        spread=replace(spread, sd=spread.sd * (1.0 if problem.log else problem.scale), at=spread.at * problem.scale),
        shares=parts.share,
        reduced=None if made else reduced(problem, best.p, parts, open_),
        condition=standard_errors(problem, best.p)[1],
        gradient=best.gradient,
        starts=(best.agreeing, best.starts),
        definition=which,
        problem=problem,
        optimum=best.p,
        bootstrap={"method": method, "draws": bootstrap, "seed": seed, "dof": dof} if bootstrap else {},
        saturation=None if made else _saturation(which, values, y, worthwhile),
        groups=replace(made, sizes=ranges(values, made), objectives=objectives(problem, best.p, made, factor)) if made else None,
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


def _carries(law: Law, columns: Mapping[str, str], y: Floats, design: Design, problem: Problem) -> None:
    count, needed = len(design.groups), int(np.sum(~problem.held))
    if count < needed:
        raise FitError(f"law {law.name} has {needed} parameters; {count} distinct size{'s' * (count != 1)} cannot carry it")
    metric = columns[law.response]
    if np.ptp(y) == 0:
        raise FitError(f"column {metric!r}: every value is {y[0]:g}; a constant metric has no law")
    if y.min() < 0 and all(term.lower >= 0 and term.sign > 0 for term in law.terms):
        row = int(np.argmax(y < 0))
        raise FitError(f"column {metric!r}, row {row + 1}: {y[row]:g}; law {law.name} ({law.formula}) has no values below zero")
    if problem.log and y.min() <= 0:
        row = int(np.argmax(y <= 0))
        raise FitError(
            f"column {metric!r}, row {row + 1}: {y[row]:g} has no logarithm for loss {problem.loss}; use huber or least-squares"
        )


def _problem(law: Law, logs: Mapping[str, Floats], y: Floats, loss: str, delta: float | None, weights: Floats) -> Problem:
    scale = float(np.median(np.abs(y))) or float(np.max(np.abs(y))) or 1.0
    if loss == "log-huber":
        turn = delta or DEFAULT_DELTA
    elif loss == "huber":
        turn = delta / scale if delta else DEFAULT_DELTA
    else:
        turn = float("inf")
    return Problem(law, logs, y[None] / scale, weights[None] / weights.mean(), loss, turn, scale)


def _design(rows: Any, rung: np.ndarray, cluster: str) -> tuple[Design, str]:
    if cluster == "auto" and "seed" not in rows.column_names:
        cluster = "rows"
    if cluster in METHODS and cluster not in rows.column_names:
        return Design(rung), cluster if cluster != "seeds" else "rows"
    design = Design(rung, labels(rows, "seed" if cluster == "auto" else cluster))
    return design, "seeds" if design.dof else "residuals"


def _noise(problem: Problem, p: Floats, design: Design) -> tuple[float, int]:
    sd, dof = noise(problem, p, design)
    return sd * (1.0 if problem.log else problem.scale), dof


def _intervals(law: Law, draws: Floats, dof: int | None) -> dict[str, tuple[float, float]]:
    if not len(draws):
        return {}
    low, high = ends(draws, PARAM_LEVEL, dof)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(law.params)}


def _warnings(columns: Mapping[str, str], problem: Problem, best: Solution, y: Floats, design: Design) -> list[str]:
    law, (lower, upper) = problem.law, problem.bounds
    dead = dead_thetas(law, best.p)
    out = []
    at_bound = ((best.p == lower) | (best.p == upper)) & ~dead & ~problem.held
    if names := [n for i, n in enumerate(law.params) if at_bound[i]]:
        out.append("bound:" + ",".join(names))
    if best.agreeing * 2 < best.starts:
        out.append(f"start:{best.agreeing}/{best.starts}")
    if not best.moved:
        out.append("start:unmoved")
    if best.gradient > AT_OPTIMUM[problem.loss]:
        out.append(f"not-optimal:{best.gradient:.0e}")
    if len(design.groups) == np.sum(~problem.held):
        out.append(f"no-spare-sizes:{len(design.groups)}")
    if float(np.max(np.abs(problem.residuals(best.p[None])))) < 1e-9:
        out.append("perfect")
    if law.response == "R" and y.max() > 1:
        out.append(f"percent:{columns['R']}")
    return out


def _identity_warnings(parts: Any, open_: list[str], of_design: list[str]) -> list[str]:
    out = ["unidentified:" + ",".join(open_)] if open_ else []
    out += [f"dead:{name}" for name in parts.dead]
    return out + [f"log-linear:{name}" for name in parts.straight] + of_design


def _of_design(values: Mapping[str, Floats], lost: list[str]) -> list[str]:
    still, pairs = collinear(values)
    out = [f"constant:{role}" for role in still] if lost or len(values) > 1 else []
    return out + [f"collinear:{one}~{other}" for one, other in pairs]


def _saturation(law: Law, values: Mapping[str, Floats], y: Floats, worthwhile: float) -> Saturation | None:
    """The verdict over the one size that varies; None where several do, or the sizes are too few for one."""
    moving = [role for role in law.sizes if np.ptp(np.log(values[role])) > 1e-9]
    if len(moving) != 1 or law.response not in ("R", "L"):
        return None
    try:
        return saturation({"N": values[moving[0]], law.response: y}, {"N": "N", law.response: law.response}, worthwhile)
    except FitError:
        return None


__all__ = ["FitResult", "Prediction", "fit_law"]
