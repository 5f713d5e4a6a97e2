"""What would decide an inconclusive verdict: more seeds at the judged sizes, or one larger size."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from fit.ladder import Line, middle, quantile, spread, top_count
from fit.tables import Floats

MOST_SEEDS = 100
"""Nobody trains each size more often; a verdict that takes more is called undecidable by seeds."""
STEPS = (2, 4, 8, 16)
"""Multiples of the largest size that are tried as the next one. Beyond, the line is a guess."""


@dataclass(frozen=True)
class Plan:
    """``seeds`` per judged size in all (not in addition) and the next size, None where that does not decide.

    ``step`` is the next size over the largest, ``runs`` how often it is trained; ``cost`` is runs times size of either way, in
    parameters, runs that are there already not counted.
    """

    seeds: int | None
    step: int | None
    runs: int
    cost: tuple[float, float]

    def words(self) -> str:
        each = f"{self.seeds} seeds at each of these sizes"
        one = f"{self.runs} run{'s' * (self.runs != 1)} at {self.step} times the largest size"
        if self.seeds and self.step:
            better, other = (each, one) if self.cost[0] <= self.cost[1] else (one, each)
            return f"If slope and noise stay as they are, {better} would just decide; or, dearer (runs times size), {other}."
        if self.seeds or self.step:
            return f"If slope and noise stay as they are, {each if self.seeds else one} would just decide."
        return (
            f"If slope and noise stay as they are, neither {MOST_SEEDS} seeds per size nor a size {STEPS[-1]} times the largest "
            "would decide."
        )


def plan(line: Line, worthwhile: float, alpha: float) -> Plan | None:
    """The least seeds per size, and the least next size, at which the slope's interval would leave the ``worthwhile`` gain.

    The line, a run's variance and the test stay as they are (the next size lies on the line and is judged with the largest sizes
    that `saturation` would then take, relative to their mean). So this is where the interval's end would lie, no number of runs
    with a given power: where the slope is right, the new one falls on either side of it, and decides about every other time.
    Seeds do not help where the noise is the sizes' own scatter (lack of fit) or where the seeds do not differ; then only a size
    is sought. None where no noise was measured.
    """
    if not line.noise.dof:
        return None
    best = line.best
    copied = best.n.max() > 1 and best.squares.sum() == 0
    seeds = None if copied or line.noise.lack is not None else _seeds(line, worthwhile, alpha)
    runs = int(best.n.max())
    step = next((m for m in STEPS if _decides(line, worthwhile, float(np.log2(m)), runs, alpha)), None)
    more: Floats = np.maximum(seeds - best.n, 0) if seeds else np.zeros(len(best.n))
    return Plan(seeds, step, runs, (float(more @ 2.0**best.x), float(runs * (step or 0) * 2.0 ** best.x[-1])))


def _seeds(line: Line, worthwhile: float, alpha: float) -> int | None:
    best = line.best

    def decides(n: int) -> bool:
        counts = np.maximum(best.n, n)
        dof = int(counts.sum()) - len(counts)
        return _half(line, best.x, counts, dof, alpha) < _distance(line, worthwhile, best.x, counts)

    numbers = range(max(2, int(best.n.min())), MOST_SEEDS + 1)
    first = bisect_left(numbers, True, key=decides)
    return numbers[first] if first < len(numbers) else None


def _decides(line: Line, worthwhile: float, further: float, runs: int, alpha: float) -> bool:
    """Whether ``runs`` runs of a size ``further`` doublings above the largest would."""
    x = np.append(line.ladder.x, line.ladder.x[-1] + further)
    n = np.append(line.ladder.n, runs)
    k = line.top or top_count(x)
    x, n = x[-k:], n[-k:]
    replicated = line.noise.lack is None and line.best.squares.sum() > 0
    dof = int(n.sum()) - k if replicated else k - 2
    return _half(line, x, n, dof, alpha) < _distance(line, worthwhile, x, n)


def _half(line: Line, x: Floats, n: Floats, dof: int, alpha: float) -> float:
    return quantile(dof, alpha) * float(np.sqrt(line.noise.variance / spread(x, n))) if dof else np.inf


def _distance(line: Line, worthwhile: float, x: Floats, n: Floats) -> float:
    """From the slope to the worthwhile gain, in the metric's unit, at the mean that the line has over sizes ``x``."""
    best = line.best
    level = middle(best.mean, best.n) + line.slope * (middle(x, n) - middle(best.x, best.n))
    return abs(line.slope - worthwhile * abs(level))
