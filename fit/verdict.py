"""`saturation`: does more size still pay? A three-way equivalence test on the gain per doubling over the largest sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fit.errors import FitError
from fit.tables import Floats, TableLike, numbers, read_table, rungs, sizes

VERDICTS = ("saturated", "still scaling", "degrading", "never scaled", "inconclusive")
LACK_OF_FIT = 0.01
"""Level of the F test of lack of fit."""


@dataclass(frozen=True)
class Saturation:
    """A verdict with its evidence.

    ``gain_per_doubling`` is in the metric's unit, positive where the metric improves (a loss that falls counts as a gain);
    ``low`` and ``high`` are its one-sided bounds at 1 - alpha each. ``relative`` is the gain over ``level``, the mean metric of
    the ``top_sizes`` (parameters, smallest first). ``worthwhile`` is the least relative gain that would count.
    """

    verdict: str
    gain_per_doubling: float
    relative: float
    low: float
    high: float
    level: float
    worthwhile: float
    alpha: float
    top_sizes: tuple[float, ...]
    seeds: tuple[int, ...]
    reason: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite bound (no noise estimate) is null."""
        values = dict(vars(self))
        for name in ("low", "high"):
            values[name] = values[name] if np.isfinite(values[name]) else None
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@dataclass(frozen=True)
class _Rungs:
    """Per size, smallest first: mean log2 N, mean gain, number of runs, and the runs' sum of squares about the mean."""

    x: Floats
    mean: Floats
    n: Floats
    squares: Floats

    def last(self, k: int) -> "_Rungs":
        return _Rungs(self.x[-k:], self.mean[-k:], self.n[-k:], self.squares[-k:])


def saturation(
    table: TableLike,
    columns: Mapping[str, str],
    worthwhile: float = 0.01,
    top: int | None = None,
    alpha: float = 0.05,
) -> Saturation:
    """Tests the gain per doubling of N over the ``top`` largest sizes against the smallest worthwhile one.

    ``columns``: ``{"N": ..., "R": ...}`` for a gain or ``{"N": ..., "L": ...}`` for a loss; rows of the same size are replicates.
    ``worthwhile``: relative gain per doubling, of the mean over those sizes. ``top``: by default the 4 largest sizes (3 where
    there are 4 or fewer, so that one is left to show earlier growth), and more
    where it takes more to span 4x and the ladder does.

    Weighted least squares on log2 N, Student's t with the replicates' pooled variance, or, where the F test of lack of fit
    rejects the line at 1%, with the sizes' own scatter about it if that makes the wider interval. `saturated` when the upper
    1-alpha bound is below the worthwhile gain and the metric did grow before, `never scaled` when it did not, `still scaling`
    when the lower bound is above it, `degrading` when the upper bound is below zero, else `inconclusive`. Two one-sided tests:
    Schuirmann 1987.
    """
    response = _response(columns)
    if not (0 < worthwhile < 1 and 0 < alpha < 0.5):
        raise FitError(f"worthwhile {worthwhile} and alpha {alpha} must be shares, such as 0.01 and 0.05")
    rows = read_table(table)
    N, y = sizes(rows, columns["N"], "N"), numbers(rows, columns[response], response)
    ladder = _ladder(N, y if response == "R" else -y)
    if len(ladder.x) < 2:
        raise FitError(f"column {columns['N']!r}: one size only; a gain per doubling needs two or more")
    if top is not None and not 2 <= top <= len(ladder.x):
        raise FitError(f"top {top} is not between 2 and the number of sizes, {len(ladder.x)}")
    k = top or _top(ladder)
    best = ladder.last(k)
    level = abs(float(np.average(best.mean, weights=best.n)))
    if level == 0:
        raise FitError(f"column {columns[response]!r}: zero at the largest sizes; a relative gain has no meaning")
    return _judge(ladder, best, level, worthwhile, alpha, _notes(best, columns, response, y))


def _response(columns: Mapping[str, str]) -> str:
    if set(columns) not in ({"N", "R"}, {"N", "L"}):
        raise FitError(
            f"saturation needs columns N and R (a gain) or N and L (a loss); got {', '.join(sorted(columns)) or 'none'}"
        )
    return "R" if "R" in columns else "L"


def _ladder(N: Floats, y: Floats) -> _Rungs:
    rung = rungs([N])
    groups = [np.flatnonzero(rung == r) for r in range(rung.max() + 1)]
    return _Rungs(
        np.array([np.log2(N[g]).mean() for g in groups]),
        np.array([y[g].mean() for g in groups]),
        np.array([float(len(g)) for g in groups]),
        np.array([float(np.sum((y[g] - y[g].mean()) ** 2)) if np.ptp(y[g]) else 0.0 for g in groups]),  # no rounding noise,
    )


def _top(ladder: _Rungs) -> int:
    count = len(ladder.x)
    least = min(count, 4, max(3, count - 1))
    wide = (k for k in range(least, count + 1) if ladder.x[-1] - ladder.x[-k] >= 2.0 - 1e-6)
    return next(wide, least)


def _notes(best: _Rungs, columns: Mapping[str, str], response: str, y: Floats) -> list[str]:
    out = []
    span = 2.0 ** (best.x[-1] - best.x[0])
    if span < 4 * 0.98:
        out.append(f"narrow:{span:.1f}x")
    if best.n.max() == 1:
        out.append("seeds:1")
    elif best.squares.sum() == 0:
        out.append(f"identical-seeds:{columns[response]}")
    if response == "R" and y.max() > 1:
        out.append(f"percent:{columns[response]}")
    return out


@dataclass(frozen=True)
class _Noise:
    """A run's variance with its degrees of freedom; ``lack``: the p value of a lack of fit where that sets the variance."""

    variance: float
    dof: int
    lack: float | None = None


def _noise(best: _Rungs, off_line: float, alpha: float) -> _Noise:
    """The replicates' variance, or the scatter of the rungs' means about the line where it is larger than that explains.

    ``off_line``: the means' weighted sum of squares about the line, with K-2 degrees of freedom. Replicates may share what
    differs between sizes (a backbone trained once), and curvature is not noise at all: in both cases the replicates' variance
    would make the slope look surer than the ladder shows it. F test of lack of fit: Draper and Smith 1998, sec. 2.1.
    """
    from scipy.special import fdtrc, stdtrit

    dof, spare = int(best.n.sum()) - len(best.n), len(best.n) - 2
    within = float(best.squares.sum())
    if within == 0:  # one seed, or seeds that do not differ: only the scatter about the line is left to tell the noise
        return _Noise(off_line / spare if spare else np.inf, spare)
    replicates = _Noise(within / dof, dof)
    if not spare:
        return replicates
    lack = float(fdtrc(spare, dof, off_line / spare / replicates.variance))
    if lack >= LACK_OF_FIT:
        return replicates
    about_line = _Noise(off_line / spare, spare, lack)
    return max(replicates, about_line, key=lambda noise: float(stdtrit(noise.dof, 1 - alpha)) * noise.variance**0.5)


def _judge(ladder: _Rungs, best: _Rungs, level: float, worthwhile: float, alpha: float, notes: list[str]) -> Saturation:
    from scipy.special import stdtrit

    centred = best.x - np.average(best.x, weights=best.n)
    sxx = float(np.sum(best.n * centred**2))
    slope = float(np.sum(best.n * centred * best.mean) / sxx)
    off_line = float(np.sum(best.n * (best.mean - np.average(best.mean, weights=best.n) - slope * centred) ** 2))
    noise = _noise(best, off_line, alpha)
    if noise.lack is not None:
        notes.append(f"lack-of-fit:{noise.lack:.1g}")
    half = float(stdtrit(noise.dof, 1 - alpha)) * np.sqrt(noise.variance / sxx) if noise.dof else np.inf
    low, high, d = slope - half, slope + half, worthwhile * level
    grew = _grew(ladder, len(best.x), alpha, noise)
    if high < 0:
        verdict = "degrading"
    elif high < d:
        verdict = "saturated" if grew else "never scaled"
    elif low > d:
        verdict = "still scaling"
    else:
        verdict = "inconclusive"
    smaller = len(ladder.x) > len(best.x)
    reason = _reason(verdict, slope / level, low / level, high / level, worthwhile, alpha, best, noise, smaller)
    return Saturation(
        verdict=verdict,
        gain_per_doubling=slope,
        relative=slope / level,
        low=low,
        high=high,
        level=level,
        worthwhile=worthwhile,
        alpha=alpha,
        top_sizes=tuple(float(2.0**x) for x in best.x),
        seeds=tuple(int(n) for n in best.n),
        reason=reason,
        warnings=tuple(notes),
    )


def _grew(ladder: _Rungs, k: int, alpha: float, noise: _Noise) -> bool:
    """Whether the top sizes' mean lies above the smallest size's: a one-sided t test with the variance of all replicates.

    ``noise``, of the top sizes' line, stands in where replicates show no variance and where they do not explain that line's
    scatter.
    """
    from scipy.special import stdtrit

    if k == len(ladder.x):
        return False
    variance, dof = noise.variance, noise.dof
    if ladder.squares.sum() > 0 and noise.lack is None:
        dof = int(ladder.n.sum()) - len(ladder.n)
        variance = float(ladder.squares.sum()) / dof
    if not dof:
        return False
    top = ladder.last(k)
    rise = float(np.average(top.mean, weights=top.n)) - float(ladder.mean[0])
    return bool(rise > float(stdtrit(dof, 1 - alpha)) * np.sqrt(variance * (1 / top.n.sum() + 1 / ladder.n[0])))


def _reason(
    verdict: str,
    gain: float,
    low: float,
    high: float,
    worthwhile: float,
    alpha: float,
    best: _Rungs,
    noise: _Noise,
    smaller: bool,
) -> str:
    sizes_text = f"Over the {len(best.x)} largest sizes ({2 ** best.x[0]:.3g} to {2 ** best.x[-1]:.3g})"
    if not np.isfinite(high):
        return f"{sizes_text} a doubling changes the metric by {gain:+.2%}; two points without repeats do not show their noise."
    start = f"{sizes_text} a doubling changes the metric by {gain:+.2%} ({1 - 2 * alpha:.0%} interval {low:+.2%} to {high:+.2%})"
    ends = {
        "saturated": f"less than the smallest worthwhile gain of {worthwhile:.2%}, after growth at smaller sizes.",
        "never scaled": f"less than the smallest worthwhile gain of {worthwhile:.2%}, and "
        + ("no growth at smaller sizes was shown." if smaller else "there is no smaller size that could show earlier growth."),
        "still scaling": f"more than the smallest worthwhile gain of {worthwhile:.2%}.",
        "degrading": "a loss: more size makes it worse.",
        "inconclusive": f"which does not decide whether it exceeds the smallest worthwhile gain of {worthwhile:.2%}.",
    }
    words = f"{start}: {ends[verdict]}" if verdict != "inconclusive" else f"{start}, {ends[verdict]}"
    if noise.lack is None:
        return words
    return (
        f"{words} These sizes scatter about a line by more than their seeds explain (lack of fit, p = {noise.lack:.1g}), "
        f"so the interval comes from that scatter, with {noise.dof} degree{'s' * (noise.dof != 1)} of freedom."
    )
