"""`saturation`: does more size still pay? A three-way equivalence test on the gain per doubling over the largest sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fit.errors import FitError
from fit.ladder import Line, fit_line, make_ladder, middle
from fit.seeds_needed import plan
from fit.tables import Floats, TableLike, numbers, read_table, sizes

VERDICTS = ("saturated", "still scaling", "degrading", "never scaled", "inconclusive")


@dataclass(frozen=True)
class Saturation:
    """A verdict with its evidence.

    ``gain_per_doubling`` is in the metric's unit, positive where the metric improves (a loss that falls counts as a gain);
    ``low`` and ``high`` are its one-sided bounds at 1 - alpha each, ``standard_error`` and ``dof`` what they are made of.
    ``relative`` is the gain over ``level``, the mean metric of the ``top_sizes`` (parameters, smallest first). ``worthwhile`` is
    the least relative gain that would count.

    p values of the one-sided tests: ``p_flat`` (gain under the worthwhile one), ``p_saturated`` (that, and growth before: the
    larger of the two tests' p values), ``p_scaling`` (gain over the worthwhile one), ``p_degrading`` (gain under zero). A claim
    is made where its p value is under ``alpha``.

    An inconclusive verdict says what would decide it, slope and noise being held: ``seeds_needed`` at each of the top sizes
    (in all), or runs of ``next_size`` (parameters). Each is None where it would not; both are where the slope lies at the
    worthwhile gain.
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
    standard_error: float
    dof: int
    p_saturated: float
    p_flat: float
    p_scaling: float
    p_degrading: float
    seeds_needed: int | None
    next_size: float | None
    line: Line = field(repr=False, compare=False)
    """The ladder and its line, for `holm`; not in `to_json`."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite bound (no noise estimate) is null."""
        values = {name: v for name, v in vars(self).items() if name != "line"}
        for name in ("low", "high", "standard_error"):
            values[name] = values[name] if np.isfinite(values[name]) else None
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


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
    Schuirmann 1987. Several curves judged in one study: pass their verdicts to `holm`.
    """
    response = _response(columns)
    if not (0 < worthwhile < 1 and 0 < alpha < 0.5):
        raise FitError(f"worthwhile {worthwhile} and alpha {alpha} must be shares, such as 0.01 and 0.05")
    rows = read_table(table)
    N, y = sizes(rows, columns["N"], "N"), numbers(rows, columns[response], response)
    ladder = make_ladder(N, y if response == "R" else -y)
    if len(ladder.x) < 2:
        raise FitError(f"column {columns['N']!r}: one size only; a gain per doubling needs two or more")
    if top is not None and not 2 <= top <= len(ladder.x):
        raise FitError(f"top {top} is not between 2 and the number of sizes, {len(ladder.x)}")
    line = fit_line(ladder, top, alpha)
    level = abs(middle(line.best.mean, line.best.n))
    if level == 0:
        raise FitError(f"column {columns[response]!r}: zero at the largest sizes; a relative gain has no meaning")
    return _judge(line, level, worthwhile, alpha, _notes(line, columns, response, y))


def _response(columns: Mapping[str, str]) -> str:
    if set(columns) not in ({"N", "R"}, {"N", "L"}):
        raise FitError(
            f"saturation needs columns N and R (a gain) or N and L (a loss); got {', '.join(sorted(columns)) or 'none'}"
        )
    return "R" if "R" in columns else "L"


def _notes(line: Line, columns: Mapping[str, str], response: str, y: Floats) -> list[str]:
    best, out = line.best, []
    reach = 2.0 ** (best.x[-1] - best.x[0])
    if reach < 4 * 0.98:
        out.append(f"narrow:{reach:.1f}x")
    if best.n.max() == 1:
        out.append("seeds:1")
    elif best.squares.sum() == 0:
        out.append(f"identical-seeds:{columns[response]}")
    if response == "R" and y.max() > 1:
        out.append(f"percent:{columns[response]}")
    if line.noise.lack is not None:
        out.append(f"lack-of-fit:{line.noise.lack:.1g}")
    return out


def _judge(line: Line, level: float, worthwhile: float, alpha: float, notes: list[str]) -> Saturation:
    half, d = line.half(alpha), worthwhile * level
    p_flat = line.p_under(d)
    found = Saturation(
        verdict="",
        gain_per_doubling=line.slope,
        relative=line.slope / level,
        low=line.slope - half,
        high=line.slope + half,
        level=level,
        worthwhile=worthwhile,
        alpha=alpha,
        top_sizes=tuple(float(2.0**x) for x in line.best.x),
        seeds=tuple(int(n) for n in line.best.n),
        reason="",
        warnings=tuple(notes),
        standard_error=line.error,
        dof=line.noise.dof,
        p_saturated=max(p_flat, line.p_growth()),
        p_flat=p_flat,
        p_scaling=line.p_over(d),
        p_degrading=line.p_under(0.0),
        seeds_needed=None,
        next_size=None,
        line=line,
    )
    verdict = _verdict(found)
    return _planned(replace(found, verdict=verdict, reason=_reason(found, verdict)), alpha)


def _verdict(found: Saturation) -> str:
    if found.p_degrading < found.alpha:
        return "degrading"
    if found.p_flat < found.alpha:
        return "saturated" if found.p_saturated < found.alpha else "never scaled"
    return "still scaling" if found.p_scaling < found.alpha else "inconclusive"


def _planned(found: Saturation, alpha: float) -> Saturation:
    """With what would decide an inconclusive verdict at level ``alpha``, as fields and at the end of the reason."""
    if found.verdict != "inconclusive":
        return replace(found, seeds_needed=None, next_size=None)
    way = plan(found.line, found.worthwhile, alpha)
    if way is None:
        return replace(found, reason=f"{found.reason} A second run of each size would show it.")
    return replace(
        found,
        seeds_needed=way.seeds,
        next_size=way.step * found.top_sizes[-1] if way.step else None,
        reason=f"{found.reason} {way.words()}",
    )


def holm(saturations: Sequence[Saturation], alpha: float = 0.05) -> list[Saturation]:
    """The verdicts of several curves, judged together.

    Whatever is true of each, the chance that *any* of them is wrongly called saturated is at most ``alpha``; so is that of any
    wrong `still scaling`, and of any wrong `degrading`.

    Holm's step-down adjustment of the p values (Holm 1979, Scandinavian Journal of Statistics 6:65), one family per claim; it
    assumes nothing of how the curves depend on each other. Returned in the given order, p values adjusted, with the warning
    `holm:` and the number of curves. ``low`` and ``high`` stay those of each curve alone. What would decide is planned at
    alpha / curves, the strictest level that Holm can ask for.
    """
    if not 0 < alpha < 0.5:
        raise FitError(f"alpha {alpha} must be a share, such as 0.05")
    # The verdicts alone are formed again, at this alpha: a second `holm` must neither adjust the first one's p values nor speak
    # of it.
    alone = [_judge(s.line, s.level, s.worthwhile, alpha, [w for w in s.warnings if w[:5] != "holm:"]) for s in saturations]
    count = len(alone)
    if count < 2:
        return alone
    flat, saturated = _holm([s.p_flat for s in alone]), _holm([s.p_saturated for s in alone])
    scaling, degrading = _holm([s.p_scaling for s in alone]), _holm([s.p_degrading for s in alone])
    out = []
    for i, before in enumerate(alone):
        found = replace(before, p_saturated=saturated[i], p_flat=flat[i], p_scaling=scaling[i], p_degrading=degrading[i])
        verdict = _verdict(found)
        reason = _reason(before, before.verdict)
        if verdict == before.verdict:
            reason += f" Judged together with the others of {count} curves (Holm), the verdict is the same."
        else:
            reason += f" That is this curve alone, {before.verdict}; among {count} curves (Holm) it is {verdict}."
        found = replace(found, verdict=verdict, reason=reason, warnings=(*before.warnings, f"holm:{count}"))
        out.append(_planned(found, alpha / count))
    return out


def _holm(p: Sequence[float]) -> list[float]:
    order = np.argsort(p, kind="stable")
    steps = np.arange(len(p), 0, -1) * np.asarray(p)[order]
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in out]


def _reason(found: Saturation, verdict: str) -> str:
    line, level, worthwhile = found.line, found.level, found.worthwhile
    best, noise = line.best, line.noise
    sizes_text = f"Over the {len(best.x)} largest sizes ({2 ** best.x[0]:.3g} to {2 ** best.x[-1]:.3g})"
    change = f"{sizes_text} a doubling changes the metric by {found.relative:+.2%}"
    if not np.isfinite(found.high):
        return f"{change}; two points without repeats do not show their noise."
    start = f"{change} ({1 - 2 * found.alpha:.0%} interval {found.low / level:+.2%} to {found.high / level:+.2%})"
    smaller = line.k < len(line.ladder.x)
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
