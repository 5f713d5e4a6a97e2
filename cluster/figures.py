"""The report's figures: both paradigms' curves on one axis, as PNG and SVG bytes that depend on nothing but the numbers."""

import io
from dataclasses import dataclass, field

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
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "grscale", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(8.6, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xscale="log", xlabel=x_label, ylabel=y_label)
        for curve in curves:
            _draw_curve(axes, curve)
        _draw_floors(axes, floors)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        if curves:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        out = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            out[kind] = buffer.getvalue()
    return out


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
