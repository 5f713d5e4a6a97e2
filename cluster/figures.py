"""The report's figures: both paradigms' curves on one axis, as PNG and SVG bytes that depend on nothing but the numbers."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COLOURS = {"sid": "#0b6e99", "llm": "#c4532d"}
NAMES = {"sid": "SID-based GR", "llm": "LLM-as-RS"}
FLOOR_NAMES = {"popularity": "popularity", "item-knn": "item-kNN", "markov": "co-occurrence", "bayes-optimal": "Bayes-optimal"}
OPTIMUM = "bayes-optimal"


@dataclass(frozen=True)
class Floor:
    """A recommender without a ladder. ``realised``: its metric on the users; ``expected``: the exact expectation, if known."""

    model: str
    realised: float
    expected: float | None = None

    @property
    def value(self) -> float:
        return self.realised if self.expected is None else self.expected

    @property
    def name(self) -> str:
        return FLOOR_NAMES.get(self.model, self.model)

    @property
    def label(self) -> str:
        """An optimum that was only realised on these users is one that luck may pass, so its line says so."""
        return f"{self.name} (realised)" if self.model == OPTIMUM and self.expected is None else self.name


@dataclass(frozen=True)
class Line:
    """A fitted law over ``x``; ``low`` and ``high`` are its bootstrap band (None: no band)."""

    label: str
    style: str
    x: Floats
    y: Floats
    low: Floats | None
    high: Floats | None


@dataclass(frozen=True)
class Curve:
    """One paradigm's points. ``x``, ``y``: (runs,) with one row per seed; ``mean_x``, ``mean``, ``half``: (rungs,)."""

    paradigm: str
    x: Floats
    y: Floats
    mean_x: Floats
    mean: Floats
    half: Floats | None
    lines: list[Line] = field(default_factory=list)


def draw(curves: list[Curve], floors: list[Floor], x_label: str, y_label: str) -> dict[str, bytes]:
    """``{"png": ..., "svg": ...}`` of the curves with a horizontal line for each floor."""
    with _figure() as (figure, out):
        axes = figure.add_subplot(xscale="log", xlabel=x_label, ylabel=y_label)
        for curve in curves:
            _draw_curve(axes, curve)
        _draw_floors(axes, floors)
        axes.set_ylim(bottom=0)
        _plain(axes)
        if curves:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return out


def draw_widths(curves: list[tuple[str, Curve]], y_label: str) -> dict[str, bytes]:
    """``{"png": ..., "svg": ...}`` of the metric over the number of beams: a panel per paradigm, a line per rung, named."""
    from matplotlib.ticker import NullLocator

    paradigms = list(dict.fromkeys(curve.paradigm for _, curve in curves))
    with _figure() as (figure, out):
        for number, paradigm in enumerate(paradigms, start=1):
            name = NAMES.get(paradigm, paradigm)
            axes = figure.add_subplot(1, len(paradigms), number, xscale="log", xlabel="beams", ylabel=y_label, title=name)
            own = [(rung, curve) for rung, curve in curves if curve.paradigm == paradigm]
            for place, (rung, curve) in enumerate(own, start=1):
                strength = 0.35 + 0.65 * place / len(own)
                style = {"color": COLOURS.get(paradigm, "#555555"), "alpha": strength, "marker": "osD^v"[(place - 1) % 5]}
                axes.errorbar(curve.mean_x, curve.mean, yerr=curve.half, capsize=3, linewidth=1.2, label=rung, **style)
            ticks = sorted({float(x) for _, curve in own for x in curve.mean_x})
            axes.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.legend(frameon=False, fontsize=9)
            _plain(axes)
    return out


@contextmanager
def _figure() -> Iterator[tuple[Any, dict[str, bytes]]]:
    """An empty figure to draw in, and where its PNG and SVG are found afterwards."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out: dict[str, bytes] = {}
    with matplotlib.rc_context({"svg.hashsalt": "grscale", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(8.6, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, out
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            out[kind] = buffer.getvalue()


def _plain(axes) -> None:  # type: ignore[no-untyped-def]  # matplotlib's types are not loaded here
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_curve(axes, curve: Curve) -> None:  # type: ignore[no-untyped-def]  # matplotlib's types are not loaded here
    colour, name = COLOURS.get(curve.paradigm, "#555555"), NAMES.get(curve.paradigm, curve.paradigm)
    for line in curve.lines:
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(line.x, line.y, line.style, color=colour, linewidth=1.4, label=f"{name}: {line.label}")
    axes.plot(curve.x, curve.y, "o", color=colour, alpha=0.35, markersize=4.5, markeredgewidth=0, zorder=3)
    axes.errorbar(
        curve.mean_x,
        curve.mean,
        yerr=curve.half,
        fmt="o" if curve.lines else "o-",
        color=colour,
        markersize=6.5,
        markerfacecolor="none",
        capsize=3,
        linewidth=1.2,
        label=f"{name}: mean of seeds",
    )


def _draw_floors(axes, floors: list[Floor]) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.transforms import blended_transform_factory

    if not floors:
        return
    right = blended_transform_factory(axes.transAxes, axes.transData)
    top = max([*(floor.value for floor in floors), axes.get_ylim()[1]])
    place = -np.inf
    for floor in sorted(floors, key=lambda floor: (floor.value, floor.model)):
        optimal = floor.model == OPTIMUM
        axes.axhline(floor.value, color="#111111" if optimal else "#888888", linestyle="--" if optimal else ":", linewidth=1.2)
        place = max(floor.value, place + 0.045 * top)  # labels of near lines are moved apart
        axes.text(
            1.01,
            place,
            floor.label,
            transform=right,
            va="center",
            fontsize=9,
            color="#111111" if optimal else "#666666",
        )
