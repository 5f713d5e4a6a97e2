"""Profile likelihood: the values of one parameter, or of one prediction, at which the law can still be fitted to the data.

The rest of the law is fitted again at each held value, from the estimate outwards, until the objective has risen by more than
noise explains. Such an interval needs no draws, is not symmetric where the law is not, and does not depend on how the law is
written. It never ends where the data say nothing, which is a finding: that end is open.
"""

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fit.errors import FitError
from fit.identify import dead_thetas
from fit.problem import Problem, jacobian
from fit.profile_path import Path, bound_of, parameter, prediction
from fit.solve import polish
from fit.starts import starts
from fit.tables import Floats

if TYPE_CHECKING:
    from fit.result import FitResult

_STEPS = 60
_EXACT = 1e-14
"""Mean square of residuals, of a metric of about one, that is rounding and no noise."""


@dataclass(frozen=True)
class Profile:
    """``low`` and ``high`` are infinite where the end is open: the data do not end the interval there (warning `open:`).

    ``points`` (k, 2), by value: values that were held, and the objective (as in `FitResult`) of the best fit that has them.
    """

    name: str
    value: float
    low: float
    high: float
    level: float
    points: Floats = field(repr=False)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; an open end is null."""
        ends = {name: v if np.isfinite(v) else None for name, v in (("low", self.low), ("high", self.high))}
        return {"value": self.value, **ends, "level": self.level, "warnings": list(self.warnings)}


def profile(result: "FitResult", what: str | Mapping[str, Any], level: float = 0.95) -> Profile:
    """The profile interval of a parameter by its name, or of the law's mean at sizes such as ``{"N": 1e9}``.

    An end is where the cost has risen by t^2/2 of the noise, t being Student's at ``level`` with rows - parameters degrees of
    freedom (least squares: Bates and Watts 1988, sec. 6.1; exact where the law is linear). Weights are taken for reciprocals of
    variances. The cost of Huber and L1 is no likelihood: the rise of it is compared with the sandwich variance of what is held
    over the variance that the cost's curvature promises (Kent 1982, Biometrika 69:19; Heritier and Ronchetti 1994, JASA 89:897),
    its curvature being smoothed over noise as wide as the residuals' middle, since few rows lie within a small delta. Where none
    lies beyond it, Huber is least squares.

    An end is open where the cost never rises enough, and where it does only because an exponent or a break ends at its own
    search range; a coefficient that may be zero ends there.

    Raises FitError for an unknown or a held parameter, for as many parameters as rows, and where the law runs through every row.
    """
    if not 0 < level < 1:
        raise FitError(f"level {level} is not between 0 and 1, such as 0.95")
    problem, p = result.problem, result.optimum
    path = parameter(result, what) if isinstance(what, str) else prediction(result, what)
    cut, unit = _cutoff(problem, p, path, level)
    walk = _Walk(problem, path, p, unit, cut)
    low, high = walk.end(-1), walk.end(+1)
    factor = (2.0 if result.loss == "least-squares" else 1.0) * (1.0 if problem.log else problem.scale**2)
    points = np.array([[path.value(point.x), (walk.least + walk.unit * point.z**2 / 2) * factor] for point in walk.solved])
    warnings = [f"open:{path.name}"] if np.isinf(low) or np.isinf(high) else []
    if walk.better:
        warnings.append(f"better-elsewhere:{path.name}")
    return Profile(path.name, path.value(path.start), low, high, level, points, tuple(warnings))


def _cost(problem: Problem, residuals: Floats) -> float:
    """Of residuals (rows,): half the sum of squares, or what Huber or L1 has in its place."""
    if problem.loss == "l1":
        return float(np.sum(problem.weights[0] * np.abs(residuals)))
    return float(problem.cost(residuals[None])[0])


def _cutoff(problem: Problem, p: Floats, path: Path, level: float) -> tuple[float, float]:
    """Student's t, and the noise that twice the rise of the cost is measured in."""
    from scipy.special import stdtrit

    r, w = problem.residuals(p[None])[0], problem.weights[0]
    free = int(np.sum(~problem.held))
    dof = len(r) - free
    if dof <= 0:
        raise FitError(f"{len(r)} rows for {free} parameters leave no noise to hold a profile against; it needs more rows")
    # Of the middle, without the rows that a fit by absolute values goes through (Maronna, Martin and Yohai 2006, eq. 4.49).
    middle = float(np.median(np.sort(np.abs(r))[free - 1 :])) / 0.6745
    if min(float(np.mean(w * r**2)), middle**2) < _EXACT:
        raise FitError("the law runs through the rows exactly; without noise a profile has no end")
    t = float(stdtrit(dof, (1 + level) / 2))
    if problem.loss == "least-squares" or (problem.loss != "l1" and np.abs(r).max() <= problem.delta):
        return t, float(np.sum(w * r**2)) / dof
    return t, _robust_unit(problem, p, path, middle) * len(r) / dof


def _robust_unit(problem: Problem, p: Floats, path: Path, middle: float) -> float:
    """What is held has a variance of d' H^-1 B H^-1 d, d its gradient, B = sum (w psi)^2 JJ' and H = sum w E[psi'] JJ', where the
    cost's own curvature promises d' H^-1 d; their ratio. E[psi'] is each row's own, since noise may differ between rows."""
    from scipy.special import ndtr

    r, w = problem.residuals(p[None])[0], problem.weights[0]
    # psi' is smoothed over noise as wide as the middle, and scaled to what it would be without if the noise were normal.
    if problem.loss == "l1":
        psi, bend = np.sign(r), np.sqrt(2.0) * 2 * np.exp(-0.5 * (r / middle) ** 2) / (np.sqrt(2 * np.pi) * middle)
    else:
        turn = problem.delta / middle
        psi = np.clip(r, -problem.delta, problem.delta)
        bend = ndtr(turn - r / middle) - ndtr(-turn - r / middle)
        bend *= (ndtr(turn) - 0.5) / (ndtr(turn / np.sqrt(2.0)) - 0.5)
    lower, upper = problem.bounds
    live = ~dead_thetas(problem.law, p) & (((p > lower) & (p < upper)) | path.own)
    J = jacobian(problem, p[None])[0, live]
    norms = np.maximum(np.linalg.norm(J, axis=1), 1e-300)
    u, s, _ = np.linalg.svd(J / norms[:, None] * np.sqrt(w * bend), full_matrices=False)
    inverse = u / np.maximum(s, 1e-10 * s[0])
    step = 1e-4 * middle * np.linalg.norm(inverse, axis=1) / norms
    moved = np.tile(p, (2 * len(step), 1))
    moved[:, live] += np.concatenate([np.diag(step), -np.diag(step)])
    high, low = np.split(path.reading(moved), 2)
    d = (high - low) / (2 * step) / norms
    x = inverse @ (inverse.T @ d)
    return float(np.sum((w * psi * (x @ (J / norms[:, None]))) ** 2) / (d @ x))


@dataclass(frozen=True, order=True)
class _Point:
    x: float
    p: Floats = field(compare=False)
    z: float = field(compare=False)
    """Root of the cost's rise over the noise, as `t` is."""
    target: float = field(compare=False)
    """The x that was to be held: a prediction is held nearly, any other parameter exactly."""


class _Walk:
    """Fits along a path, each from its neighbours'. ``unit`` and ``cut``: of `_cutoff`."""

    def __init__(self, problem: Problem, path: Path, p: Floats, unit: float, cut: float) -> None:
        self.problem, self.path, self.unit, self.cut = problem, path, unit, cut
        self.least = _cost(problem, problem.residuals(p[None])[0])
        self.start = _Point(path.start, p, 0.0, path.start)
        self.solved = [self.start]
        self.better = False

    def end(self, direction: int) -> float:
        """The value at which the interval ends in a ``direction`` (-1 or 1), infinite where it is open."""
        bound, closed = (self.path.low, self.path.closed[0]) if direction < 0 else (self.path.high, self.path.closed[1])
        open_ = float(direction * np.inf)
        if closed == 0 and np.isinf(bound) and self._fit(bound, self._starts(bound)).z <= self.cut:
            return 0.0
        here, step = self.start, self.path.step
        for _ in range(_STEPS):
            if here.x == bound:
                return open_ if closed is None else closed
            to = max(here.target - step, bound) if direction < 0 else min(here.target + step, bound)
            if abs(to - self.path.start) > self.path.reach:
                return open_
            there = self._fit(to)
            if there.z > self.cut:
                there = self._between(here, there)
                if there.z > 0.999 * self.cut:
                    return open_ if self.path.ranged and self._at_range(there) else self.path.value(there.x)
            gained = there.z - here.z
            step *= float(np.clip(0.5 * self.cut / gained, 0.25, 4.0)) if gained > 0 else 4.0
            here = there
        return open_

    def _between(self, inside: _Point, outside: _Point) -> _Point:
        """Where the profile passes the cut; or a point that does not, of another valley, from which to go on outwards."""
        from scipy.optimize import brentq

        again = self._fit(outside.target, self._starts(outside.target))
        if again.z <= self.cut:
            return again
        ends = {
            inside.target: inside.z,
            outside.target: min(again.z, outside.z, 1e3 * self.cut),
        }  # not fitted again: the signs must differ

        def excess(x: float) -> float:
            return (ends[x] if x in ends else self._fit(x).z) - self.cut

        near = 1e-7 * abs(outside.target - inside.target)
        return self._fit(brentq(excess, inside.target, outside.target, xtol=near, rtol=1e-14))

    def _fit(self, x: float, candidates: Floats | None = None) -> _Point:
        """The best fit with ``x`` held, from its neighbours' or from ``candidates`` (starts, params)."""
        problem = self.path.held(x)
        candidates = self._warm(x) if candidates is None or not len(candidates) else candidates
        found, _ = polish(problem, self.path.seat(candidates, x))
        p = found[int(np.argmin(problem.objective(found)))]
        rows = self.problem.y.shape[1]  # of the table, without one that holds a prediction
        rise = 2 * (_cost(self.problem, problem.residuals(p[None])[0, :rows]) - self.least)
        self.better |= rise < -1e-6 * self.unit
        point = _Point(self.path.at(p, x), p, float(np.sqrt(max(rise, 0.0) / self.unit)), x)
        if np.isfinite([point.x, point.z]).all() and not any(other.target == x and other.z <= point.z for other in self.solved):
            self.solved = [other for other in self.solved if other.target != x]
            insort(self.solved, point)
        return point

    def _starts(self, x: float) -> Floats:
        """Of other valleys; none of a law of many groups, whose grid would have too many points."""
        return np.empty((0, len(self.start.p))) if self.problem.law.groups else starts(self.path.held(x), 3)

    def _warm(self, x: float) -> Floats:
        """(starts, params): at the nearest point that was fitted, and on the line through the nearest two."""
        near = sorted(self.solved, key=lambda point: abs(point.target - x))[:2]
        if dead_thetas(self.problem.law, near[0].p).any():
            # From a term that is nothing no step leads anywhere, since its exponent may be any.
            return np.concatenate([near[0].p[None], self._starts(x)])
        if len(near) < 2 or not np.isfinite(x) or near[0].target in (x, near[1].target):
            return near[0].p[None]
        share = (x - near[0].target) / (near[1].target - near[0].target)
        return np.array([near[0].p, near[0].p + share * (near[1].p - near[0].p)])

    def _at_range(self, point: _Point) -> bool:
        """Whether another parameter, which still does something, is at the end of its search range."""
        problem = self.path.held(point.x)
        law, m, (lower, upper) = problem.law, len(problem.law.terms), problem.bounds
        live = ~(problem.held | dead_thetas(law, point.p))
        return any(
            live[i]
            and (
                (point.p[i] <= lower[i] and bound_of(law, i, theta.lower) is None)
                or (point.p[i] >= upper[i] and bound_of(law, i, theta.upper) is None)
            )
            for i, theta in enumerate(law.thetas, m)
        )
