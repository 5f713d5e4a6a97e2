"""Least squares, Huber and L1 fits of a law: a grid over the exponents, then Newton steps on all parameters.

On the grid the linear parameters follow exactly from the exponents (variable projection, Golub and Pereyra 1973); the best
distinct grid points are polished with the analytic gradient and Hessian. Whether a point is an optimum is judged by its own
scaled projected gradient, never by how the iteration ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from fit.errors import FitError
from fit.laws import EXPONENT_BOUNDS, Law
from fit.tables import Floats

LOSSES = {"log-huber": "log", "huber": "linear", "l1": "log", "least-squares": "linear"}
"""Each loss and the residuals it is taken of: log(predicted) - log(observed), or predicted - observed."""

STARTS = 6
AT_OPTIMUM = {"log-huber": 1e-5, "huber": 1e-5, "least-squares": 1e-5, "l1": 1e-3}
"""Scaled projected gradients up to this are an optimum's; L1's is that of its smoothed form, steep within 1e-7 of its kinks."""
_L1_SMOOTHING = 1e-7  # of the median residual: Huber with so small a delta is L1 to 7 digits


@dataclass(frozen=True)
class Problem:
    """One weighted fit. ``logs``: natural logarithms of centred sizes, (rows,) each; ``y``, ``weights``: (rows,).

    ``delta`` is where Huber turns from square to absolute, in the residual's unit (infinite: least squares).
    """

    law: Law
    logs: Mapping[str, Floats]
    y: Floats
    weights: Floats
    loss: str
    delta: float

    @property
    def log(self) -> bool:
        return LOSSES[self.loss] == "log"

    @property
    def bounds(self) -> tuple[Floats, Floats]:
        low, high = EXPONENT_BOUNDS
        q = len(self.law.nonlinear)
        lower = np.array([t.lower for t in self.law.terms] + [low] * q)
        return lower, np.array([np.inf] * len(self.law.terms) + [high] * q)

    def residuals(self, p: Floats) -> Floats:
        """(rows,); not finite where a log residual has no value."""
        m = len(self.law.terms)
        fitted = self.law.basis(self.logs, p[m:]) @ p[:m]
        return self.of_fitted(fitted)

    def of_fitted(self, fitted: Floats) -> Floats:
        if not self.log:
            return fitted - self.y
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.log(np.where(fitted > 0, fitted, np.nan)) - np.log(self.y)

    def cost(self, residuals: Floats) -> Floats:
        """Sum over the last axis of Huber (r^2/2 within delta, delta |r| - delta^2/2 beyond); infinite for no value."""
        size = np.abs(residuals)
        if np.isinf(self.delta):
            terms = 0.5 * size**2
        else:
            terms = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
        total = np.sum(self.weights * terms, axis=-1)
        return np.where(np.isnan(total), np.inf, total)

    def objective(self, p: Floats) -> float:
        """The loss as users know it, summed over rows: Huber, sum of |r|, or sum of r^2."""
        r = self.residuals(p)
        if self.loss == "l1":
            total = float(np.sum(self.weights * np.abs(r)))
            return total if np.isfinite(total) else float("inf")
        return float(self.cost(r)) * (2.0 if self.loss == "least-squares" else 1.0)


@dataclass(frozen=True)
class Solution:
    """``p``: (params,); ``gradient``: scaled projected gradient, 0 at an optimum, at most 1; ``agreeing`` of ``starts``."""

    p: Floats
    objective: float
    gradient: float
    starts: int = 1
    agreeing: int = 1


def solve(problem: Problem, warm: Floats | None = None) -> Solution:
    """The best optimum found.

    With ``warm`` (a bootstrap draw's), only the better of that start and, for one exponent, the best grid point is polished, to a
    millionth: that is far below what the draws differ by.
    """
    if warm is not None:
        found = starts(problem, 1) if len(problem.law.nonlinear) <= 1 else []
        return polish(problem, min([warm, *found], key=problem.objective), tolerance=1e-6)
    candidates = starts(problem, STARTS)
    if not candidates:
        raise FitError(f"law {problem.law.name}: no start gives positive predictions; use a loss on linear residuals (huber)")
    polished = [polish(problem, p) for p in candidates]
    best = min(polished, key=lambda s: s.objective)
    agreeing = sum(s.objective <= best.objective * (1 + 1e-6) + 1e-20 for s in polished)
    return replace(best, starts=len(polished), agreeing=agreeing)


def starts(problem: Problem, count: int) -> list[Floats]:
    """The ``count`` best grid points that are not each other's neighbours, with their linear parameters."""
    q = len(problem.law.nonlinear)
    ticks = np.geomspace(*EXPONENT_BOUNDS, 40 if q == 1 else 20)
    cells = np.indices((len(ticks),) * q).reshape(q, -1).T if q else np.empty((1, 0), dtype=np.intp)
    theta = ticks[cells]
    basis = problem.law.basis(problem.logs, theta)
    scale = problem.y if problem.log else np.ones_like(problem.y)  # relative residuals stand in for log residuals
    weights = np.broadcast_to(problem.weights / scale**2, basis.shape[:2])
    lower = problem.bounds[0][: len(problem.law.terms)]
    c = bounded_least_squares(basis, problem.y, weights, lower)
    if np.isfinite(problem.delta) or problem.loss == "l1":
        for _ in range(8):
            r = np.abs(np.einsum("grm,gm->gr", basis, c) - problem.y) / scale
            delta = problem.delta if problem.loss != "l1" else 1e-2 * max(float(np.median(r)), 1e-300)
            huber = np.minimum(1.0, delta / np.maximum(r, 1e-300))
            c = bounded_least_squares(basis, problem.y, weights * huber, lower)
    fitted = np.einsum("grm,gm->gr", basis, c)
    costs = problem.cost(problem.of_fitted(fitted)) if problem.loss != "l1" else _l1(problem, fitted)
    chosen: list[int] = []
    for i in np.argsort(costs, kind="stable"):
        if len(chosen) == count or not np.isfinite(costs[i]):
            break
        if all(np.max(np.abs(cells[i] - cells[j]), initial=0) > 1 for j in chosen):
            chosen.append(int(i))
    return [np.concatenate([c[i], theta[i]]) for i in chosen]


def _l1(problem: Problem, fitted: Floats) -> Floats:
    total = np.sum(problem.weights * np.abs(problem.of_fitted(fitted)), axis=-1)
    return np.where(np.isnan(total), np.inf, total)


def bounded_least_squares(basis: Floats, y: Floats, weights: Floats, lower: Floats) -> Floats:
    """Exact weighted least squares with lower bounds of 0 (or none), for every grid point at once.

    ``basis`` (grid, rows, m), ``y`` (rows,), ``weights`` (grid, rows); returns (grid, m). With few parameters the bounded optimum
    is the best feasible one among the solutions that hold each subset of them at zero.
    """
    m = basis.shape[-1]
    weighted = basis * weights[..., None]
    gram = np.einsum("grm,grk->gmk", weighted, basis)
    right = np.einsum("grm,r->gm", weighted, y)
    diagonal = np.maximum(np.einsum("gmm->gm", gram), 1e-300)
    root = np.sqrt(diagonal)
    gram = gram / (root[:, :, None] * root[:, None, :]) + 1e-13 * np.eye(m)  # the ridge only keeps twin columns solvable
    right = right / root
    best = np.zeros((len(basis), m))
    gain = np.full(len(basis), -np.inf)
    bounded = [j for j in range(m) if lower[j] == 0]
    for held in product((False, True), repeat=len(bounded)):
        free = [j for j in range(m) if not (j in bounded and held[bounded.index(j)])]
        c = np.zeros((len(basis), m))
        if free:
            c[:, free] = np.linalg.solve(gram[:, free][:, :, free], right[:, free, None])[..., 0]
        value = 2 * np.sum(c * right, axis=1) - np.einsum("gm,gmk,gk->g", c, gram, c)
        better = np.all(c[:, bounded] >= 0, axis=1) & (value > gain)
        best[better], gain[better] = c[better], value[better]
    return np.asarray(best / root)


def polish(problem: Problem, p: Floats, tolerance: float = 1e-10) -> Solution:
    """Descends from ``p`` to the optimum of its valley.

    Where delta is small against the residuals the loss is nearly L1, whose kinks stop Newton steps far from the optimum; so delta
    is brought down from the residuals' own size.
    """
    gradient = 0.0
    for delta in _deltas(problem, float(np.median(np.abs(problem.residuals(p))))):
        p, gradient = _newton(replace(problem, delta=delta), p, tolerance)
    return Solution(p, problem.objective(p), gradient)


def _deltas(problem: Problem, spread: float) -> list[float]:
    last = max(_L1_SMOOTHING * spread, 1e-12) if problem.loss == "l1" else problem.delta
    steps = int(np.ceil(np.log(spread / last) / np.log(6.0))) if last < spread < np.inf else 0
    return [*(spread / 6.0**k for k in range(steps)), last]


def _newton(problem: Problem, p: Floats, tolerance: float, iterations: int = 200) -> tuple[Floats, float]:
    """Damped Newton steps within the bounds; returns the point and its scaled projected gradient.

    The damping blends the exact Hessian (fast near the optimum) into the reweighted Gauss-Newton one (safe far from it, and
    positive where few rows lie within delta), then into steepest descent.
    """
    lower, upper = problem.bounds
    p = np.clip(p, lower, upper)
    cost = float(problem.cost(problem.residuals(p)))
    damping, gradient = 1e-2, 0.0
    for _ in range(iterations):
        g, hessian, majorant, cosines = _derivatives(problem, p)
        free = ~(((p <= lower) & (g > 0)) | ((p >= upper) & (g < 0)))
        gradient = float(np.max(np.abs(cosines[free]), initial=0.0))
        if gradient < tolerance or cost <= 1e-26 * float(np.sum(problem.weights)):
            return (
                p,
                0.0 if gradient >= tolerance else gradient,
            )  # the second case: residuals are rounding, their direction says nothing
        while damping < 1e12:
            step = _step(g, hessian, majorant, free, damping)
            if step is None:
                damping = max(4 * damping, 1e-6)
                continue
            trial = np.clip(p + step, lower, upper)
            trial_cost = float(problem.cost(problem.residuals(trial)))
            moved = trial - p
            promised = -(g @ moved + 0.5 * moved @ hessian @ moved)
            kept = (cost - trial_cost) / promised if promised > 0 else (1.0 if trial_cost < cost else -1.0)
            if kept < 0.25:
                damping = max(4 * damping, 1e-6)
            elif kept > 0.75:
                damping = damping / 8 if damping > 1e-8 else 0.0
            if trial_cost < cost and kept > 1e-3:
                p, cost = trial, trial_cost
                break
            if 0 <= promised <= max(1e-16, tolerance**2) * cost:
                return p, gradient
        else:
            break
    return p, gradient


def _step(g: Floats, hessian: Floats, majorant: Floats, free: np.ndarray, damping: float) -> Floats | None:
    # Far from an optimum steps shrink along the reweighted Gauss-Newton direction, which follows the valley; the diagonal, which
    # does not, is the last resort where a bound cuts that direction off.
    matrix = hessian + damping * (majorant if damping < 1e6 else np.diag(np.diag(majorant)))
    matrix = matrix[np.ix_(free, free)]
    scale = np.sqrt(np.maximum(np.diag(majorant)[free], 1e-300))
    matrix = matrix / np.outer(scale, scale) + 1e-14 * np.eye(len(scale))
    try:
        factor = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    step = np.zeros_like(g)
    step[free] = -np.linalg.solve(factor.T, np.linalg.solve(factor, g[free] / scale)) / scale
    return step


def jacobian(problem: Problem, p: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """(fitted (rows,), d residual / d p (rows, params), basis, its slopes) at ``p``."""
    m = len(problem.law.terms)
    basis = problem.law.basis(problem.logs, p[m:])
    first, second = problem.law.slopes(problem.logs, basis)
    fitted = basis @ p[:m]
    J = np.concatenate([basis, np.einsum("rmq,m->rq", first, p[:m])], axis=1)
    curve = np.zeros((len(p), len(p), len(fitted)))
    for k in range(first.shape[-1]):
        curve[:m, m + k] = curve[m + k, :m] = first[:, :, k].T
        curve[m + k, m + k] = second[:, :, k] @ p[:m]
    if problem.log:
        J = J / fitted[:, None]
        curve = curve / fitted - np.einsum("ri,rj->ijr", J, J)
    return fitted, J, curve, basis


def _derivatives(problem: Problem, p: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Gradient, Hessian, reweighted Gauss-Newton Hessian, and the gradient as cosines between residuals and columns."""
    fitted, J, curve, _ = jacobian(problem, p)
    r = problem.of_fitted(fitted)
    inside = np.abs(r) <= problem.delta
    psi = np.where(inside, r, np.sign(r) * problem.delta) if np.isfinite(problem.delta) else r
    reweight = (
        np.where(inside, 1.0, problem.delta / np.maximum(np.abs(r), 1e-300)) if np.isfinite(problem.delta) else np.ones_like(r)
    )
    w = problem.weights
    g = J.T @ (w * psi)
    majorant = J.T @ (J * (w * reweight)[:, None])
    hessian = J.T @ (J * (w * inside)[:, None]) + curve @ (w * psi)
    norms = np.sqrt(np.maximum(np.sum(w[:, None] * J**2, axis=0) * np.sum(w * psi**2), 1e-300))
    return g, hessian, majorant, g / norms
