"""What `grscale fit --out` leaves: the numbers, the figures, and one HTML page that holds all of it and needs nothing else."""

import base64
import io
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from fit.errors import FitError
from fit.figures import figures, moving
from fit.holdout import Holdout, leave_largest_out
from fit.law_saturation import SaturationSize, saturation_size
from fit.tables import numbers, where
from fit.words import explain

if TYPE_CHECKING:
    from fit.result import FitResult

FIGURES = ("fit", "residuals", "correlation", "leave-largest-out")
_AHEAD = (1, 2, 4, 8, 16)
"""Times the largest fitted size that the page predicts."""
_HELD_OUT_DRAWS, _HELD_OUT_ROWS = 400, 1000

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
code {{ overflow-wrap: anywhere; }} figure {{ margin: 1rem 0; }} img {{ max-width: 100%; height: auto; }}
figcaption, .note {{ color: #555; font-size: .9rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
.verdict {{ border-left: 4px solid #0b6e99; padding: .1rem 1rem; }} .warnings li {{ margin: .3rem 0; }}
</style>
</head>
<body>
"""


def write(
    result: "FitResult", table: pa.Table, out: Path, source: str = "", cluster: str = "auto", constrained: bool = False
) -> None:
    """Writes report.html, fit.json, draws.csv (if any) and the figures as PNG and SVG into ``out``, each file whole.

    ``table``: the rows of the fit. ``source``: what the page says they are. ``cluster``, ``constrained``: as the fit was made,
    the latter where it had bounds, fixed values or weights. Of an earlier fit's files those that this one lacks are removed, so
    that the folder is of one fit. Same input, same bytes.
    """
    points = {role: numbers(table, name, role) for role, name in result.columns.items()}
    held = _held_out(result, table, cluster, constrained)
    drawn = figures(result, points, held if isinstance(held, Holdout) else None)
    files = {f"{name}.{kind}": content for name, kinds in drawn.items() for kind, content in kinds.items()}
    files |= _numbers_of(result)
    svgs = {name: kinds["svg"] for name, kinds in drawn.items()}
    files["report.html"] = page(result, svgs, held, _size(result, table), source).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _whole(out / name, content)
    for name in {"draws.csv", *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))} - set(files):
        (out / name).unlink(missing_ok=True)


def write_groups(result: "FitResult", table: pa.Table, out: Path, source: str = "", cluster: str = "auto") -> None:
    """As `write`, of a fit to groups: fit.json and draws.csv of the whole in ``out``, each group's page and figures in a folder
    of its own, named ``column=group``."""
    groups = result.groups
    if groups is None:
        raise FitError("the fit has no groups; write makes its page")
    for level in groups.levels:
        folder = out / quote(f"{groups.column}={level}", safe=" =")
        here = where(table, {groups.column: level})
        write(result.group(level), here, folder, f"{source} {groups.column}={level}".strip(), cluster, constrained=True)
    for name, content in _numbers_of(result).items():
        _whole(out / name, content)
    if not len(result.draws):
        (out / "draws.csv").unlink(missing_ok=True)


def _numbers_of(result: "FitResult") -> dict[str, bytes]:
    """fit.json, and draws.csv where there are draws."""
    files = {"fit.json": json.dumps(result.to_json(), indent=1, allow_nan=False).encode() + b"\n"}
    if len(result.draws):
        text = io.StringIO()
        np.savetxt(text, result.draws, delimiter=",", header=",".join(result.params), comments="")
        files["draws.csv"] = text.getvalue().encode()
    return files


def _whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(path)


def _held_out(result: "FitResult", table: pa.Table, cluster: str, constrained: bool) -> Holdout | str:
    """The rolling leave-largest-out of the same fit, or why there is none."""
    if constrained:
        return "the fit had bounds, fixed values or weights, or shared parameters, which it does not take"
    if result.n > _HELD_OUT_ROWS:
        return f"{result.n} rows take minutes (the page makes it up to {_HELD_OUT_ROWS}); fit.holdout.leave_largest_out does it"
    draws = min(len(result.draws), _HELD_OUT_DRAWS)
    delta = result.delta if result.loss in ("log-huber", "huber") else None
    seed = result.bootstrap.get("seed", 0)
    try:
        return leave_largest_out(table, result.law, result.columns, result.loss, delta, draws, seed, cluster)
    except FitError as error:
        return str(error)


def _size(result: "FitResult", table: pa.Table) -> SaturationSize | None:
    if set(result.sizes) != {"N"} or result.definition.response not in ("R", "L"):
        return None
    return saturation_size(result, table)


def page(result: "FitResult", svgs: dict[str, bytes], held: Holdout | str, size: SaturationSize | None, source: str = "") -> str:
    """The HTML page; ``svgs`` are the figures by name, ``held`` a leave-largest-out or why there is none."""
    law = result.definition
    title = law.name if law.name in law.formula else f"{law.name}: {law.formula}"
    columns = ", ".join(f"{role} is {name!r}" for role, name in result.columns.items())
    parts = [
        _HEAD.format(title=escape(law.name)),
        f"<h1>{escape(title)}</h1>",
        f"<p>{result.n} rows{' of <code>' + escape(source) + '</code>' if source else ''}; {escape(columns)}.</p>",
        _verdict(result, size),
        _warnings(result),
        "<h2>Parameters</h2>",
        _parameters(result),
        _made(result),
        "<h2>The law and the data</h2>",
        _figure(svgs, "fit", _caption(result)),
        "<h2>Residuals</h2>",
        _figure(svgs, "residuals", "Points above the line lie above the law. A bend or a trend here is a law that does not fit."),
        "<h2>Correlation of the parameters</h2>",
        _figure(
            svgs,
            "correlation",
            "Of the bootstrap draws: parameters near ±1 trade off and mean little one by one; those that never moved are out.",
        )
        if "correlation" in svgs
        else "<p>No draws that differ: <code>--bootstrap 1000</code> gives them.</p>",
        "<h2>Leave largest out</h2>",
        _rolling(held, svgs),
        "<h2>Beyond the fitted sizes</h2>",
        _beyond(result),
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _figure(svgs: dict[str, bytes], name: str, caption: str) -> str:
    # An image rather than inline markup: several SVGs in one document would share their ids.
    data = base64.b64encode(svgs[name]).decode()
    return (
        f'<figure><img alt="{escape(name)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _caption(result: "FitResult") -> str:
    if len(moving(result)) != 1:
        return "Each row's fitted value against its observed one; on the dashed line they agree."
    if len(result.draws):
        return "The darker band is of the law's mean, the lighter one of one more run at that size."
    return "No bands: they need the draws of a bootstrap."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or np.isnan(value):
        return "–"
    return f"{value:.{digits}g}" if np.isfinite(value) else ("∞" if value > 0 else "-∞")


def _span(low: float | None, high: float | None, digits: int = 4) -> str:
    return "–" if low is None or high is None else f"{_number(low, digits)} to {_number(high, digits)}"


def _verdict(result: "FitResult", size: SaturationSize | None) -> str:
    lines = []
    if result.saturation is not None:
        lines.append(f"<strong>{escape(result.saturation.verdict)}</strong>: {escape(result.saturation.reason)}")
    if size is not None:
        lines.append(escape(_flattens(size)))
    if result.reduced is not None:
        lines.append(f"What these data do identify: <strong>{escape(result.reduced)}</strong>.")
    if not lines:
        return ""
    return '<div class="verdict">' + "\n".join(f"<p>{line}</p>" for line in lines) + "</div>"


def _flattens(size: SaturationSize) -> str:
    """Where the law itself saturates, with what is to be said against it."""
    if size.size is None:
        said = "No saturation size."
    else:
        ends = f" ({size.interval:.0%} interval {_span(size.low, size.high)})" if size.low is not None else ""
        where = f"from N = {_number(size.size)} on" if np.isfinite(size.size) else "at no size within reach"
        said = f"By the law, a doubling gains less than {100 * size.worthwhile:.3g}% of the metric {where}{ends}."
    return " ".join([said, *map(explain, size.warnings)])


def _warnings(result: "FitResult") -> str:
    coded = [*result.warnings, *(result.saturation.warnings if result.saturation else ())]
    if not coded:
        return ""
    items = "\n".join(f"<li>{escape(explain(w))} <code>{escape(w)}</code></li>" for w in dict.fromkeys(coded))
    return f'<h2>Warnings</h2>\n<ul class="warnings">\n{items}\n</ul>'


def _parameters(result: "FitResult") -> str:
    rows = []
    for name, value in result.params.items():
        # Where the data leave a parameter open, a number to copy would mislead.
        point = "not identified" if name in result.unidentified else _number(value, 6)
        low, high = result.intervals.get(name, (None, None))
        # Held where the design says nothing of it, it is the same in every draw: no interval, however narrow it looks.
        span = "open" if name in result.unidentified and low is not None and low == high else _span(low, high, 6)
        share = f"{result.shares[name]:.3g}" if name in result.shares else ""
        rows.append((name, point, span, share))
    note = "Share: the term's range over the fitted rows, as a part of the fitted values' range."
    return _table(("", "estimate", "95% interval", "share"), rows) + f'\n<p class="note">{note}</p>'


def _made(result: "FitResult") -> str:
    unit = "of the logarithm" if result.loss in ("log-huber", "l1") else "of the metric"
    delta = "" if result.delta is None else f" (delta {_number(result.delta)})"
    facts = [
        f"loss {result.loss}{delta}, objective {_number(result.objective, 10)}",
        f"{result.starts[0]} of {result.starts[1]} starts of the search reached it",
        f"condition number {_number(result.condition)}",
        f"a run's standard deviation {_number(result.noise[0])} {unit} ({result.noise[1]} degrees of freedom)",
    ]
    if result.aicc is not None:
        facts.append(f"AICc {result.aicc:.2f}")
    if result.bootstrap:
        made = result.bootstrap
        facts.append(f"{made['draws']} draws by {made['method']}, seed {made['seed']}")
    return f'<p class="note">{escape("; ".join(facts))}.</p>'


def _rolling(held: Holdout | str, svgs: dict[str, bytes]) -> str:
    if isinstance(held, str):
        return f"<p>None: {escape(held)}.</p>"
    facts = f"Mean absolute error one size ahead {held.next_error:.2%}; of 'as at the largest fitted size' {held.naive_error:.2%}"
    facts += f"; of all predictions {held.mean_error:.2%}, with their sign {held.bias:+.2%}."
    if held.next_coverage is not None:
        facts += f" Within their {held.interval:.0%} interval lie {held.next_coverage:.0%} of the runs one size ahead"
        facts += f" and {held.coverage:.0%} of all."
    roles = list(held.next[0].sizes)
    rows = [
        (
            *(_number(row.sizes[role]) for role in roles),
            str(row.fitted),
            _number(row.observed),
            _number(row.predicted),
            _span(row.low, row.high),
            f"{row.error:+.2%}",
            _number(row.distance, 3),
        )
        for row in held.next
    ]
    head = (*(held.columns[role] for role in roles), "sizes fitted", "observed", "predicted", "interval of a run", "error")
    caption = "The law fitted to the smaller sizes, and what it then said of the larger ones."
    failed = "".join(f"<p>With {k} sizes there was no fit: {escape(why)}.</p>" for k, why in held.failed.items())
    shown = _figure(svgs, "leave-largest-out", caption)
    return f"{shown}\n<p>{escape(facts)}</p>\n{_table((*head, 'distance'), rows)}{failed}"


def _beyond(result: "FitResult") -> str:
    """Predictions past the largest sizes that vary, the others held, and how far out each of them is."""
    roles = moving(result)
    if not roles:
        return "<p>No size varies in this table, so nothing is known beyond it.</p>"
    ahead = np.array(_AHEAD, dtype=np.float64)
    sizes = {role: result.sizes[role][1] * (ahead if role in roles else np.ones(len(ahead))) for role in result.definition.sizes}
    rows = {result.columns[role]: values for role, values in sizes.items()}
    mean, run = result.predict(rows), result.predict(rows, new_run=True)
    cells = []
    for i, times in enumerate(_AHEAD):
        spans = ["–" if p.low is None or p.high is None else _span(float(p.low[i]), float(p.high[i])) for p in (mean, run)]
        here = [_number(float(sizes[role][i])) for role in roles]
        cells.append((f"{times}x", *here, _number(float(mean.value[i])), *spans, _number(float(mean.distance[i]), 3)))
    head = ("", *(result.columns[role] for role in roles), "predicted", "90% of the mean", "90% of a new run", "distance")
    note = (
        "Times the largest fitted size. Distance: how far beyond, in units of the logarithmic range that was fitted. "
        "The intervals hold if the law does; leave-largest-out shows how far that went."
    )
    return _table(head, cells) + f'\n<p class="note">{escape(note)}</p>'
