"""The report's figures as PNG and SVG bytes that depend on nothing but the numbers."""

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fit.holdout import HeldOut, Holdout
from fit.tables import Floats

if TYPE_CHECKING:
    from fit.result import FitResult

LAW, SPARE, INK = "#0b6e99", "#c4532d", "#444444"
_MANY = 2000
"""Points beyond which they are drawn as pixels: an SVG of a hundred thousand circles opens in no browser."""
_BARS = 300
"""Rows up to which each fitted value gets its interval; more would be a grey cloud."""

Draw = Callable[[Any], None]
"""Draws on a matplotlib Axes."""


def moving(result: "FitResult") -> list[str]:
    """The roles of sizes that vary among the fitted rows, in the law's order."""
    return [role for role in result.definition.sizes if result.sizes[role][1] > result.sizes[role][0] * (1 + 1e-9)]


def figures(result: "FitResult", points: Mapping[str, Floats], holdout: Holdout | None) -> dict[str, dict[str, bytes]]:
    """``{"fit": {"png": ..., "svg": ...}, "residuals": ..., "correlation": ..., "leave-largest-out": ...}``, the last two where
    there are draws and where ``holdout`` is given. ``points``: (rows,) per role of the fitted table, the metric's included."""
    drawn: dict[str, Draw] = {}
    if len(moving(result)) == 1:
        drawn["fit"] = lambda axes: _law(axes, result, points)
    else:
        drawn["fit"] = lambda axes: _against_observed(axes, result, points)
    drawn["residuals"] = lambda axes: _residuals(axes, result, points)
    if result.correlation is not None and result.correlation.any():
        drawn["correlation"] = lambda axes: _correlation(axes, result)
    if holdout is not None:
        drawn["leave-largest-out"] = lambda axes: _held_out(axes, holdout)
    return {name: _render(draw, square=name == "correlation") for name, draw in drawn.items()}


def _render(draw: Draw, square: bool) -> dict[str, bytes]:
    import warnings

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "fit", "svg.fonttype": "path", "font.size": 10}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a column named in a script that the font has not
        figure = Figure(figsize=(4.8, 4.0) if square else (7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if not square:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
            axes.set_axisbelow(True)
        draw(axes)
        out = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            out[kind] = buffer.getvalue()
            figure.set_layout_engine("none")  # laid out once, for both
    return out


def _name(text: str) -> str:
    """A column's name as a label: no dollar of it begins a formula, and a long one is cut."""
    text = " ".join(text.split())
    return (text if len(text) <= 60 else text[:59] + "…").replace("$", r"\$")


def _dots(axes: Any, x: Floats, y: Floats, **style: Any) -> None:
    look = {"color": INK, "alpha": 0.55, "markersize": 4.5, "markeredgewidth": 0, "zorder": 3}
    if many := len(x) > _MANY:
        look |= {"alpha": 0.2, "markersize": 3}
    axes.plot(x, y, "o", rasterized=many, **(look | style))


def _legend(axes: Any, columns: int = 4) -> None:
    axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _limits(must: Floats, may: Floats) -> tuple[float, float]:
    """Ends of an axis that show all of ``must`` and of ``may`` what lies within half as much again: a band that runs away must
    not flatten the rest."""
    must = must[np.isfinite(must)]
    low, high = float(must.min()), float(must.max())
    room = (high - low) / 2 or abs(high) or 1.0
    may = may[np.isfinite(may)].clip(low - room, high + room)
    low, high = min([low, *may]), max([high, *may])
    margin = 0.05 * (high - low) or room
    return low - margin, high + margin


def _law(axes: Any, result: "FitResult", points: Mapping[str, Floats]) -> None:
    """The law over the one size that varies and two doublings beyond, the others held at their value."""
    (role,) = moving(result)
    response = result.definition.response
    first, last = result.sizes[role]
    x = np.concatenate([np.geomspace(first, last, 90), last * 2.0 ** np.linspace(0.1, 2.0, 20)])
    rows = {result.columns[r]: x if r == role else np.full(len(x), result.sizes[r][0]) for r in result.definition.sizes}
    mean = result.predict(rows)
    bands = [mean.value[90:]]
    if mean.low is not None and mean.high is not None:
        run = result.predict(rows, new_run=True)
        axes.fill_between(x, run.low, run.high, color=LAW, alpha=0.13, linewidth=0, label="90% band of a new run")
        axes.fill_between(x, mean.low, mean.high, color=LAW, alpha=0.3, linewidth=0, label="90% band of the mean")
        bands += [band for band in (run.low, run.high) if band is not None]
    axes.plot(x[:90], mean.value[:90], color=LAW, linewidth=1.5, zorder=4, label="law")
    axes.plot(x[89:], mean.value[89:], "--", color=LAW, linewidth=1.2, zorder=4, label="beyond the fitted sizes")
    _dots(axes, points[role], points[response], label="observed")
    axes.set(xscale="log", xlabel=_name(result.columns[role]), ylabel=_name(result.columns[response]))
    must, may = np.concatenate([points[response], mean.value[:90]]), np.concatenate(bands)
    if points[response].min() > 0 and points[response].max() > 20 * points[response].min():
        axes.set_yscale("log")
        ends = _limits(np.log(must[must > 0]), np.log(may[may > 0]))
        axes.set_ylim(np.exp(ends[0]), np.exp(ends[1]))
    else:
        axes.set_ylim(*_limits(must, may))
    _legend(axes, 3)


def _against_observed(axes: Any, result: "FitResult", points: Mapping[str, Floats]) -> None:
    response = result.definition.response
    observed = points[response]
    name = _name(result.columns[response])
    fitted = fitted_values(result, observed)
    if len(observed) <= _BARS and len(result.draws):
        mean = result.predict({result.columns[r]: points[r] for r in result.definition.sizes})
        axes.vlines(observed, mean.low, mean.high, color=LAW, alpha=0.45, linewidth=1.2, label="90% interval of the mean")
    ends = [min(observed.min(), fitted.min()), max(observed.max(), fitted.max())]
    axes.plot(ends, ends, "--", color="#888888", linewidth=1.2, label="fitted = observed")
    _dots(axes, observed, fitted, color=LAW, label="rows")
    if ends[0] > 0 and ends[1] > 20 * ends[0]:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=f"{name}, observed", ylabel=f"{name}, fitted")
    _legend(axes)


def fitted_values(result: "FitResult", observed: Floats) -> Floats:
    """(rows,) from the residuals: no curve of any draw is worked out."""
    return observed * np.exp(result.residuals) if in_logs(result) else observed + result.residuals


def in_logs(result: "FitResult") -> bool:
    return result.loss in ("log-huber", "l1")


def _residuals(axes: Any, result: "FitResult", points: Mapping[str, Floats]) -> None:
    """Observed less fitted, so that a point above the line is one that lies above the law."""
    role = (moving(result) or list(result.definition.sizes))[0]
    shown = np.expm1(-result.residuals) * 100 if in_logs(result) else -result.residuals
    spread = result.noise[0]
    band = 100 * np.expm1(1.645 * np.array([-spread, spread])) if in_logs(result) else 1.645 * np.array([-spread, spread])
    axes.axhspan(*band, color=LAW, alpha=0.10, linewidth=0, label="±1.645 standard deviations of a run")
    axes.axhline(0, color=LAW, linewidth=1.2)
    _dots(axes, points[role], shown, label="rows")
    name = _name(result.columns[result.definition.response])
    axes.set(xscale="log", xlabel=_name(result.columns[role]))
    axes.set_ylabel("observed - fitted (% of fitted)" if in_logs(result) else f"{name}: observed - fitted")
    _legend(axes)


def _correlation(axes: Any, result: "FitResult") -> None:
    """Of the parameters that moved between draws: of the others there is nothing to show."""
    correlation = result.correlation
    assert correlation is not None
    moved = np.flatnonzero(np.diag(correlation) > 0)
    names = [list(result.params)[i] for i in moved]
    correlation = correlation[np.ix_(moved, moved)]
    mesh = axes.pcolormesh(correlation, cmap="RdBu_r", vmin=-1, vmax=1, edgecolors="white", linewidth=1)
    for i, j in np.ndindex(correlation.shape):
        value = correlation[i, j]
        text = f"{value:.2f}".replace("-0.00", "0.00")
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=9, color="white" if abs(value) > 0.6 else "#222222")
    ticks = np.arange(len(names)) + 0.5
    axes.set_xticks(ticks, [_name(n) for n in names])
    axes.set_yticks(ticks, [_name(n) for n in names])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(mesh, ax=axes, label="correlation of the draws", shrink=0.85)


def _held_out(axes: Any, holdout: Holdout) -> None:
    """Relative errors by size; of predictions more than one size ahead only the point."""
    near, far = holdout.next, tuple(row for row in holdout.rows if row.steps > 1)
    errors = [_percent(holdout.rows, lambda r: r.error), _percent(near, lambda r: r.naive)]
    bars: list[Floats] = []
    axes.axhline(0, color="#888888", linewidth=1.2)
    if far:
        style = {"color": LAW, "alpha": 0.3, "markersize": 4}
        _dots(axes, _places(holdout, far), _percent(far, lambda r: r.error), label="the law, more sizes ahead", **style)
    if all(row.low is not None and row.high is not None for row in near):
        bars = [
            _percent(near, lambda r: (r.low or 0.0) / r.observed - 1),
            _percent(near, lambda r: (r.high or 0.0) / r.observed - 1),
        ]
        label = f"{holdout.interval:.0%} interval of a new run"
        axes.vlines(_places(holdout, near), *bars, color=LAW, linewidth=1.4, alpha=0.6, label=label)
    style = {"color": LAW, "alpha": 1.0, "markersize": 6.5}
    _dots(axes, _places(holdout, near), errors[0][[r.steps == 1 for r in holdout.rows]], label="the law, one size ahead", **style)
    axes.plot(_places(holdout, near), errors[1], "x", color=SPARE, zorder=3, label="'as at the largest fitted size'")
    axes.set_ylim(*_limits(np.concatenate([*errors, [0.0]]), np.concatenate([*bars, []])))
    names = " x ".join(_name(holdout.columns.get(role, role)) for role in holdout.by.split("*"))
    axes.set(xscale="log", xlabel=f"{names}, held out", ylabel="error of the prediction (%)")
    _legend(axes, 2)


def _percent(rows: tuple[HeldOut, ...], of: Callable[[HeldOut], float]) -> Floats:
    return np.array([100 * of(row) for row in rows])


def _places(holdout: Holdout, rows: tuple[HeldOut, ...]) -> Floats:
    """(rows,) what the sizes are ordered by."""
    return np.array([np.prod([row.sizes[role] for role in holdout.by.split("*")]) for row in rows])
