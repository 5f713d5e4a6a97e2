"""`crossover`: from which size, compute or cost on does one fitted law beat another?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fit.allocation import doubts
from fit.errors import FitError
from fit.result import FitResult, finite
from fit.tables import Floats
from fit.uncertainty import tail

Cost: TypeAlias = Callable[[Floats], Floats] | Mapping[float, float]
"""What a size costs: a function of sizes (points,), or measured costs by size, between which logarithms are interpolated."""

_POINTS = 1001
_REACH = 1e6  # how far beyond the fitted sizes a cost function is asked for the sizes of a cost


@dataclass(frozen=True)
class Crossover:
    """``winner``: the law, `one` or `other`, that is better at the top of ``within``. ``at``: the last crossing, from where on it
    is; None where it is better throughout.

    ``low`` and ``high``: the interval of that point; 0 stands for 'already at the lower end of ``within``', infinity for 'not
    before its upper end', and both are None without draws. ``crosses``, ``throughout`` and ``never``: the shares of draws in
    which the winner takes the lead within, leads throughout, and is not the better at the top. ``crossings``: of the two point
    fits; over one, the order changes back and forth. ``sizes``: of each law at ``at``; ``distance``: beyond its fitted ones.
    """

    one: str
    other: str
    winner: str
    at: float | None
    low: float | None
    high: float | None
    interval: float
    within: tuple[float, float]
    crossings: int
    crosses: float | None
    throughout: float | None
    never: float | None
    sizes: tuple[float, float] | None
    distance: tuple[float, float] | None
    warnings: tuple[str, ...]

    @property
    def text(self) -> str:
        """The answer in a sentence."""
        winner, loser = (self.one, self.other) if self.winner == "one" else (self.other, self.one)
        low, high = self.within
        if self.at is None:
            start = f"no crossing within {low:.3g} to {high:.3g}: {winner} ({self.winner}) is better throughout"
        else:
            start = f"{winner} ({self.winner}) is better than {loser} from {self.at:.3g} on, within {low:.3g} to {high:.3g}"
        if self.low is None or self.high is None:
            return f"{start}; no interval, for the fits have no draws."
        ends = f"{_end(self.low, low, high)} to {_end(self.high, low, high)}"
        return f"{start} ({self.interval:.0%} interval {ends}; {self.never:.0%} of draws never get there)."

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; an infinite end is null."""
        values = dict(vars(self)) | {"text": self.text, "within": list(self.within)}
        values["high"] = None if self.high is None else finite(self.high)
        for name in ("sizes", "distance"):
            values[name] = None if values[name] is None else [finite(v) for v in values[name]]
        return values | {"warnings": list(self.warnings)}


def _end(value: float, low: float, high: float) -> str:
    if value == 0:
        return f"below {low:.3g}"
    return f"{value:.3g}" if np.isfinite(value) else f"above {high:.3g}"


def crossover(
    one: FitResult,
    other: FitResult,
    by: tuple[Cost, Cost] | None = None,
    size: tuple[str, str] | None = None,
    at: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
    within: tuple[float, float] | None = None,
    interval: float = 0.9,
) -> Crossover:
    """Where the metrics of two fitted laws cross, both gains (R) or both losses (L), at equal size, or at equal cost.

    ``by``: what a size costs, for each law (FLOPs, dollars, seconds), growing with the size; None compares equal sizes. ``size``:
    of a law of several sizes, the one that moves; its others are held ``at`` given values, for each law. ``within``: where to
    look, in the unit of the comparison, by default from the smallest to the largest fitted size of either. Measured costs are not
    extrapolated, so they narrow it.

    Draws are taken in pairs, the i-th of one fit with the i-th of the other: for fits to runs of their own that is the draw of
    two independent samples. Raises FitError for a gain and a loss, for costs that do not grow, and where nothing can be compared.
    """
    kinds = [fit.definition.response for fit in (one, other)]
    if kinds[0] != kinds[1]:
        raise FitError(f"law {one.law} is of {kinds[0]} and law {other.law} of {kinds[1]}; a gain and a loss do not cross")
    if kinds[0] not in ("R", "L"):
        raise FitError(f"law {one.law} is of {kinds[0]}: name the metric R (more is better) or L (less is better)")
    if not 0 < interval < 1:
        raise FitError(f"interval {interval} is not between 0 and 1, such as 0.9")
    roles = [_moving(fit, size[i] if size else None, at[i]) for i, fit in enumerate((one, other))]
    maps = [_inverse(fit, roles[i], by[i] if by else None) for i, fit in enumerate((one, other))]
    low, high = _range([(one, roles[0]), (other, roles[1])], maps, within)
    x = np.linspace(np.log(low), np.log(high), _POINTS)
    curves = [_along(fit, roles[i], maps[i].size(x), at[i]) for i, fit in enumerate((one, other))]
    draws = min(len(curve) for curve in curves)
    lead = (curves[1][:draws] - curves[0][:draws]) * (1.0 if kinds[0] == "R" else -1.0)
    winner = "other" if lead[0, -1] > 0 else "one"
    starts = _takes_the_lead(lead if winner == "other" else -lead, x)
    return _result(one, other, winner, starts, lead[0], x, maps, roles, at, interval)


def _moving(fit: FitResult, role: str | None, at: Mapping[str, float]) -> str:
    known = fit.definition.sizes
    if role is None and len(known) == 1:
        return known[0]
    if role not in known:
        raise FitError(f"law {fit.law} has sizes {', '.join(known)}; name the one that moves in size, not {role!r}")
    if missing := [other for other in known if other != role and not at.get(other, 0) > 0]:
        raise FitError(f"law {fit.law}: a value above zero is needed for {missing[0]} in at")
    return str(role)


@dataclass(frozen=True)
class _Map:
    """Sizes by cost: logarithms, (points,) each, both growing."""

    log_cost: Floats
    log_size: Floats

    def size(self, x: Floats) -> Floats:
        return np.asarray(np.interp(x, self.log_cost, self.log_size))

    def cost(self, size: float) -> float:
        return float(np.interp(np.log(size), self.log_size, self.log_cost))


def _inverse(fit: FitResult, role: str, cost: Cost | None) -> _Map:
    low, high = fit.sizes[role]
    if isinstance(cost, Mapping):
        sizes = np.array(sorted(cost), dtype=np.float64)
        costs = np.array([cost[key] for key in sorted(cost)], dtype=np.float64)
        if len(sizes) < 2 or not (sizes.min() > 0 and np.all(costs > 0)):
            raise FitError(f"costs of law {fit.law}: two or more sizes above zero are needed, each with a cost above zero")
    else:
        sizes = np.geomspace(low / _REACH, high * _REACH, 8 * _POINTS)
        costs = sizes if cost is None else np.asarray(cost(sizes), dtype=np.float64)
        if costs.shape != sizes.shape:
            raise FitError(f"costs of law {fit.law}: the function gave shape {costs.shape} for sizes of shape {sizes.shape}")
        good = np.isfinite(costs) & (costs > 0)
        sizes, costs = sizes[good], costs[good]
    if len(costs) < 2 or not np.all(np.diff(costs) > 0):
        raise FitError(f"costs of law {fit.law} do not grow with {role}; a cost then stands for no one size")
    return _Map(np.log(costs), np.log(sizes))


def _range(fits: list[tuple[FitResult, str]], maps: list[_Map], within: tuple[float, float] | None) -> tuple[float, float]:
    """Where both laws can be asked."""
    if within is None:
        ends = [np.exp(map_.cost(end)) for (fit, role), map_ in zip(fits, maps, strict=True) for end in fit.sizes[role]]
        within = float(min(ends)), float(max(ends))
    elif not 0 < within[0] < within[1] < np.inf:
        raise FitError(f"within {within} is not a range above zero, such as (1e15, 1e20)")
    low = max(within[0], *(float(np.exp(map_.log_cost[0])) for map_ in maps))
    high = min(within[1], *(float(np.exp(map_.log_cost[-1])) for map_ in maps))
    if not low < high:
        raise FitError("the two laws have no cost in common within which they could cross")
    return low, high


def _along(fit: FitResult, role: str, log_size: Floats, at: Mapping[str, float]) -> Floats:
    """(1 + draws, points)."""
    logs = {name: np.full(len(log_size), np.log(at[name])) for name in fit.definition.sizes if name != role}
    return fit.curves({**logs, role: log_size})


def _takes_the_lead(lead: Floats, x: Floats) -> Floats:
    """(draws,): the logarithm of the point from which on ``lead`` (draws, points) stays above zero: -inf where it always is, inf
    where it is not at the end."""
    behind = lead <= 0
    last = lead.shape[1] - 1 - np.argmax(behind[:, ::-1], axis=1)  # the last point behind
    out = np.where(behind.any(axis=1), np.inf, -np.inf)
    inside = np.flatnonzero(behind.any(axis=1) & (last < lead.shape[1] - 1))
    before, after = lead[inside, last[inside]], lead[inside, last[inside] + 1]
    step = x[1] - x[0]
    out[inside] = x[last[inside]] + step * before / (before - after)
    return out


def _result(
    one: FitResult,
    other: FitResult,
    winner: str,
    starts: Floats,
    lead: Floats,
    x: Floats,
    maps: list[_Map],
    roles: list[str],
    held: tuple[Mapping[str, float], Mapping[str, float]],
    interval: float,
) -> Crossover:
    at = float(np.exp(starts[0])) if np.isfinite(starts[0]) else None
    crossings = int(np.sum(np.diff(np.sign(lead)) != 0))
    warnings = [w for fit, name in ((one, "one"), (other, "other")) for w in (f"{name}:{code}" for code in doubts(fit))]
    if crossings > 1:
        warnings.append(f"crossings:{crossings}")
    low = high = crosses = throughout = never = sizes = distance = None
    if len(starts) > 1:
        dofs = [fit.bootstrap["dof"] for fit in (one, other) if fit.bootstrap["dof"]]
        share, drawn = tail(interval, min(dofs, default=None)), np.exp(starts[1:])
        low, high = (float(end) for end in np.quantile(drawn, [share, 1 - share], method="inverted_cdf"))
        throughout, never = float(np.mean(drawn == 0)), float(np.mean(np.isinf(drawn)))
        crosses = 1.0 - throughout - never
    if at is not None:
        sizes = (float(np.exp(maps[0].size(starts[:1])[0])), float(np.exp(maps[1].size(starts[:1])[0])))
        there = [
            fit.predict({role: [size] for role, size in {**held[i], roles[i]: sizes[i]}.items()})
            for i, fit in enumerate((one, other))
        ]
        distance = (float(there[0].distance[0]), float(there[1].distance[0]))
        warnings += [f"{name}:{code}" for name, near in zip(("one", "other"), there, strict=True) for code in near.warnings]
    return Crossover(
        one=one.law,
        other=other.law,
        winner=winner,
        at=at,
        low=low,
        high=high,
        interval=interval,
        within=(float(np.exp(x[0])), float(np.exp(x[-1]))),
        crossings=crossings,
        crosses=crosses,
        throughout=throughout,
        never=never,
        sizes=sizes,
        distance=distance,
        warnings=tuple(warnings),
    )
