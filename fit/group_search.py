"""Where the search for a grouped law's optimum starts, and its resamples: group by group, as far as they share nothing.

Given the shared nonlinear parameters the problem falls apart by groups, so no grid is over all groups' parameters at once.
"""

from dataclasses import replace

import numpy as np

from fit.groups import Groups, split
from fit.laws import Law, constrained
from fit.problem import Problem
from fit.solve import Solution, solve, solve_tables
from fit.starts import TICKS, apart, crossed, grid_costs, some_rows, ticks
from fit.tables import Floats
from fit.uncertainty import Design, resample


def solve_each(problem: Problem) -> Solution:
    """The best optimum of a law whose groups share nothing: each group's."""
    p, found = np.empty(len(problem.law.params)), []
    for at, part in split(problem):
        found.append(solve(part))
        p[at] = found[-1].p
    return Solution(
        p,
        sum(one.objective for one in found),
        max(one.gradient for one in found),
        sum(one.starts for one in found),
        sum(one.agreeing for one in found),
        any(one.moved for one in found),
    )


def solve_each_tables(problem: Problem, warm: Floats, tolerance: float) -> Floats:
    """As `solve_tables`, for a law whose groups share nothing."""
    out = np.empty((max(len(problem.y), len(problem.weights)), len(warm)))
    for at, part in split(problem):
        out[:, at] = solve_tables(part, warm[at], tolerance)
    return out


def group_starts(problem: Problem, count: int) -> Floats:
    """(starts, params): up to ``count`` grid points of the shared nonlinear parameters, the best summed over the groups, each
    group being there at the best of its own grid.

    With a shared coefficient that sum is too good to be true. So further starts hold all that is shared at what one group alone,
    or all rows as one group, would make of it.
    """
    problem = problem.take(np.zeros(1, dtype=np.intp))
    law, (_, base) = problem.law, problem.law.groups[0]
    out = [_best_cells(problem, count)]
    common = [i for i, name in enumerate(law.params) if name in base.params]
    coefficients = any(i < len(law.terms) for i in common)
    if coefficients:
        pooled = replace(problem, law=_pooled(law), logs={role: problem.logs[role] for role in base.sizes}, around=None)
        for one in (pooled, *(part for _, part in split(problem))):
            plain = one.plain(solve(one).p[None])[0]
            held = {law.params[i]: float(plain[base.params.index(law.params[i])]) for i in common}
            if np.isfinite(list(held.values())).all():
                out.append(_best_cells(replace(problem, law=constrained(law, {}, held)), 1))
    every = np.concatenate(out)
    if coefficients:
        for p in every:
            p[: len(law.terms)] = _linear(problem, p[len(law.terms) :])
    return every[np.isfinite(problem.cost(problem.residuals(every)))]


def _pooled(law: Law) -> Law:
    """The law of one group for all rows, within the bounds of what is shared."""
    _, base = law.groups[0]
    shared_terms, shared_thetas = {t.name: t for t in law.terms}, {t.name: t for t in law.thetas}
    return replace(
        base,
        terms=tuple(
            replace(t, lower=shared_terms[t.name].lower, upper=shared_terms[t.name].upper) if t.name in shared_terms else t
            for t in base.terms
        ),
        thetas=tuple(shared_thetas.get(t.name, t) for t in base.thetas),
    )


def _best_cells(problem: Problem, count: int) -> Floats:
    """(starts, params): for the best cells of the shared nonlinear parameters, each group's best cell of its own ones. Shared
    coefficients are the last group's."""
    law, m = problem.law, len(problem.law.terms)
    parts = [(at, some_rows(part)) for at, part in split(problem)]
    base = parts[0][1].law
    k, common = len(base.terms), [i for i, name in enumerate(base.nonlinear) if name in law.params]
    free = TICKS.get(max(int(np.sum(~part.held[k:])) for _, part in parts), 6)
    shared = {i: ticks(problem, law.thetas[parts[0][0][k + i] - m], int(parts[0][0][k + i]), free) for i in common}
    shape = tuple(len(shared[i]) for i in common)
    total, best = np.zeros(int(np.prod(shape))), []
    for _, part in parts:
        axes = [shared[i] if i in shared else ticks(part, theta, k + i, free) for i, theta in enumerate(part.law.thetas)]
        cells, theta = crossed(axes)
        (c,), (costs,) = grid_costs(part, part.basis(theta))
        key = np.ravel_multi_index(tuple(cells[:, common].T), shape) if common else np.zeros(len(cells), dtype=np.intp)
        order = np.lexsort((costs, key))
        least = order[np.searchsorted(key[order], np.arange(len(total)))]
        total += costs[least]
        best.append(np.concatenate([c, theta], axis=1)[least])
    where = np.stack(np.unravel_index(np.arange(len(total)), shape), axis=1) if common else np.zeros((1, 0))
    chosen = apart(where, total, count)
    out = np.empty((len(chosen), len(law.params)))
    for (at, _), found in zip(parts, best, strict=True):
        out[:, at] = found[chosen]
    return out


def _linear(problem: Problem, theta: Floats) -> Floats:
    """(linear,): all groups' linear parameters at ``theta`` (nonlinear,), exact for squares, nearly so for Huber and L1."""
    from scipy.optimize import lsq_linear

    m = len(problem.law.terms)
    lower, upper = problem.bounds[0][:m], problem.bounds[1][:m]
    basis, free, c = problem.basis(theta[None])[0], lower < upper, np.where(lower < upper, 0.0, lower)
    if not free.any():
        return c
    unit = problem.y[0] if problem.log else np.ones_like(problem.y[0])  # relative residuals stand in for log residuals
    target = (problem.y[0] - basis[:, ~free] @ c[~free]) / unit
    columns = basis[:, free] / unit[:, None]
    norms = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    columns = columns / norms
    squares = np.isinf(problem.delta) and problem.loss != "l1"
    weight = np.broadcast_to(problem.weights[0], target.shape)
    for _ in range(1 if squares else 8):
        root = np.sqrt(weight)
        found = lsq_linear(columns * root[:, None], target * root, (lower[free] * norms, upper[free] * norms), method="bvls")
        r = np.abs(columns @ found.x - target)
        delta = problem.delta if problem.loss != "l1" else 1e-2 * max(float(np.median(r)), 1e-300)
        weight = problem.weights[0] * np.minimum(1.0, delta / np.maximum(r, 1e-300))
    c[free] = found.x / norms
    return np.asarray(np.clip(c, lower, upper))


def resample_groups(problem: Problem, p: Floats, groups: Groups, design: Design, method: str, draws: int, seed: int) -> Problem:
    """As `resample`; rows or sizes are drawn within each group, so that none loses its own."""
    if method not in ("rows", "sizes"):
        return resample(problem, p, design, method, draws, seed)
    weights = np.empty((draws, problem.y.shape[1]))
    for k, (at, part) in enumerate(split(problem)):
        rows = groups.member == k
        own = Design(np.unique(design.rung[rows], return_inverse=True)[1].reshape(-1))
        weights[:, rows] = resample(part, p[at], own, method, draws, _seed(seed, k)).weights
    return replace(problem, weights=weights)


def _seed(seed: int, k: int) -> int:
    return int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
