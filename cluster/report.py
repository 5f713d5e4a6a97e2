"""A study's report: verdicts, laws, figures and tables from its metrics, written whole into ``report/``.

It reads the measured rows and, for intervals of differences, the rankings they were measured on. The same rows and rankings give
the same bytes.
"""

import base64
import csv
import io
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster.figures import NAMES, Curve, Floats, Floor, Line, draw
from cluster.graph import width_name
from cluster.report_widths import BAND, by_width, pooled_half, read_widths
from cluster.report_widths import figure as width_figure
from cluster.report_words import floors
from cluster.tuning import edges
from fit import FitError, FitResult, Saturation, explain, fit_law, saturation
from gr.errors import UserError
from gr.files import read_json, whole_folder

Row = dict[str, Any]

PARADIGMS = ("sid", "llm")
DRAWS = 400
_CEILING_SIZES = 4  # the ceiling law has 3 parameters; through 3 sizes it would run exactly


def write_report(study_dir: Path) -> dict[str, Any]:
    """Writes ``study_dir/report/`` (index.html, figures, points.csv, fit.json) from ``study_dir/metrics/*.parquet``.

    Returns what fit.json holds: ``study``, ``metric``, ``worthwhile`` and ``groups``, one per (dataset, protocol, paradigm) with
    its ``verdict`` (fit's Saturation, or None with the reason in ``words``) and ``laws``; with several beam widths ``widths``,
    of `cluster.report_widths.by_width`. UserError if there are no rows or no such metric.
    """
    from cluster.report_tables import page

    settings = _settings(study_dir)
    rows = _rows(study_dir, settings["metric"])
    measured = [row for row in rows if row.get("status", "ok") == "ok" and _number(row.get(settings["metric"])) is not None]
    report: dict[str, Any] = {**settings, "points": len(measured), "groups": []}
    widths = read_widths(study_dir, {str(row.get("run_id")) for row in measured})
    if widths:
        report["widths"] = by_width(widths, settings["metric"], settings["worthwhile"], study_dir)
    figures: list[dict[str, Any]] = []
    for dataset, protocol in sorted({(row["dataset"], row["protocol"]) for row in measured}):
        here = [row for row in measured if (row["dataset"], row["protocol"]) == (dataset, protocol)]
        curves = []
        for paradigm in PARADIGMS:
            group, curve = _analyse([row for row in here if row["paradigm"] == paradigm], paradigm, settings)
            if curve is not None:
                report["groups"].append({"dataset": dataset, "protocol": protocol, "paradigm": paradigm, **group})
                curves.append(curve)
        drawn = _figures(curves, here, floors(here, settings["metric"]), settings["metric"])
        groups = [g for g in report.get("widths", ()) if (g["dataset"], g["protocol"]) == (dataset, protocol)]
        drawn["widths"] = width_figure(groups, widths, settings["metric"])
        figures += _named(drawn, dataset, protocol)
    measurements = {str(row.get("run_id")) for row in measured} | {width_name(r["run_id"], r["beams"]) for r in widths}
    failures = _failures(study_dir, measurements)
    with whole_folder(study_dir / "report") as out:
        for figure in figures:
            for kind, content in figure["files"].items():
                (out / f"{figure['name']}.{kind}").write_bytes(content)
            figure["src"] = "data:image/svg+xml;base64," + base64.b64encode(figure["files"]["svg"]).decode()
        (out / "points.csv").write_text(_csv(rows), encoding="utf-8")
        (out / "fit.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (out / "index.html").write_text(page(report, measured, figures, failures, study_dir, widths), encoding="utf-8")
    return report


def verdict_lines(report: dict[str, Any]) -> list[str]:
    """One line per paradigm, for the end of a run."""
    return [f"{title(group)}: {group['words']}" for group in report["groups"]]


def title(group: dict[str, Any]) -> str:
    return f"{NAMES[group['paradigm']]} on {group['dataset']}, {group['protocol']}"


def _settings(study_dir: Path) -> dict[str, Any]:
    """plan.json has the resolved values, study.yaml what was written, with the study's defaults; one of them may be missing."""
    found: dict[str, Any] = {"study": study_dir.resolve().name, "metric": "recall@10", "worthwhile": 0.01}
    contents = []
    for name, read in (("study.yaml", lambda p: yaml.safe_load(p.read_text(encoding="utf-8"))), ("plan.json", read_json)):
        path = study_dir / name
        if path.is_file():
            try:
                contents.append(read(path))
            except (yaml.YAMLError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    contents = [content for content in contents if isinstance(content, dict)]
    if not contents:
        raise UserError(
            f"{study_dir}: not a study folder; it has no study.yaml or plan.json, which say the metric and the worthwhile gain"
        )
    for content in contents:
        found.update({key: content[key] for key in found if content.get(key) is not None})
    return found


def _rows(study_dir: Path, metric: str) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((study_dir / "metrics").glob("*.parquet"))
    if not files:
        raise UserError(f"{study_dir / 'metrics'}: no measured points; `grscale run` writes them there")
    rows: list[Row] = []
    for file in files:
        try:
            rows += pq.read_table(file).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{file}: cannot be read ({' '.join(str(error).split())}); delete it and run the study again"
            ) from None
    if not any(metric in row for row in rows):
        raise UserError(f"{study_dir / 'metrics'}: no column {metric!r}, the study's metric")
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    paradigm = row["paradigm"]
    place = PARADIGMS.index(paradigm) if paradigm in PARADIGMS else len(PARADIGMS)
    size = _number(row.get("n_total"))
    return (
        row["dataset"],
        row["protocol"],
        place,
        size if size is not None else math.inf,
        str(row["model"]),
        row.get("seed") or 0,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _analyse(rows: list[Row], paradigm: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Curve | None]:
    """The verdict and laws of one paradigm's rows (as for fit.json), and its curve over the total parameters."""
    sized = [row for row in rows if (_number(row.get("n_total")) or 0) > 0]
    if not sized:
        return {}, None
    sized, twins = _one_model_per_size(sized)
    size, fixed = _ladder(sized, paradigm)
    total = np.array([float(row["n_total"]) for row in sized])
    table = {
        size: total - fixed,
        "metric": np.array([float(row[settings["metric"]]) for row in sized]),
        "seed": np.array([int(row.get("seed") or 0) for row in sized]),
    }
    columns = {"N": size, "R": "metric"}
    sizes = np.unique(table[size])
    group: dict[str, Any] = {"size": size, "fixed": fixed, "sizes": len(sizes), "verdict": None, "laws": [], "notes": twins}
    if warning := edges((str(row["model"]), str(row.get("lr_choice"))) for row in sized):
        group["notes"].append(warning)
    lines: list[Line] = []
    if len(sizes) < 2:
        group["words"] = "no verdict: one size was measured, and a law needs two or more."
        return group, _curve(paradigm, total, table["metric"], lines)
    verdict = _tried(lambda: saturation(table, columns, worthwhile=settings["worthwhile"]), group["notes"])
    if verdict is not None:
        group["verdict"] = verdict.to_json()
        group["words"] = _sentence(verdict, size)
        group["notes"] += [explain(code) for code in verdict.warnings]
    else:
        group["words"] = "no verdict: " + group["notes"][-1]
    laws = ["ceiling", "log-linear"] if len(sizes) >= _CEILING_SIZES else ["log-linear"]
    if len(laws) == 1:
        group["notes"].append(
            f"{len(sizes)} sizes cannot carry the ceiling law and a check of it (3 parameters, {_CEILING_SIZES} sizes at least), "
            "so only the log-linear law was fitted; whether there is a ceiling stays open."
        )
    fits: list[FitResult] = []
    for law in laws:
        fit = partial(fit_law, table, law, columns, loss="least-squares", bootstrap=DRAWS, seed=0)
        fitted = _tried(fit, group["notes"])
        if fitted is not None:
            fits.append(fitted)
            document = fitted.to_json()
            document.pop("saturation", None)  # the study's own, with its worthwhile gain, stands beside the laws
            group["laws"].append(document)
            lines.append(_line(fitted, sizes, size, fixed))
    group["comparison"] = _comparison(fits)
    return group, _curve(paradigm, total, table["metric"], lines)


def _ladder(rows: list[Row], paradigm: str) -> tuple[str, float]:
    """The size that the ladder enlarges and the parameters beside it: `n_total` less these is that size.

    A SID ladder over recommenders keeps its encoder and quantizer; counted in, they would press its sizes together. Where they
    differ between rungs, the size is the whole.
    """
    beside = {_number(row["n_total"] - row["n_rs"]) for row in rows if row.get("n_rs") is not None}
    if paradigm == "sid" and len(beside) == 1 and (fixed := beside.pop()) is not None:
        return "n_rs", fixed
    return "n_total", 0.0


def _one_model_per_size(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """Of the models of one size (a rung tried at several learning rates, say) that with the least validation loss: the others
    are no replicates of it. With a note for each size that had several."""
    kept, notes = [], []
    for size in sorted({row["n_total"] for row in rows}):
        here = [row for row in rows if row["n_total"] == size]
        losses: dict[str, list[float]] = {}
        for row in here:
            loss = _number(row.get("loss_val"))
            losses.setdefault(str(row["model"]), []).append(math.inf if loss is None else loss)
        best = min(losses, key=lambda model: float(np.mean(losses[model])))
        kept += [row for row in here if str(row["model"]) == best]
        if len(losses) > 1:
            notes.append(f"{', '.join(sorted(losses))} have one size; {best}, of the least validation loss, stands for it.")
    return kept, notes


def _tried(function: Callable[[], Any], notes: list[str]) -> Any:
    """The function's result; None, with the reason among the notes, where the rows cannot carry it."""
    try:
        return function()
    except FitError as error:
        notes.append(f"{error}")
        return None


def _sentence(verdict: Saturation, size: str) -> str:
    return f"{verdict.verdict} in {size}. {verdict.reason}"


def _comparison(fits: list[FitResult]) -> str:
    scores = {fitted.law: fitted.aicc for fitted in fits}
    ceiling, line = scores.get("ceiling"), scores.get("log-linear")
    if ceiling is None or line is None:
        return ""
    margin = abs(ceiling - line)
    if margin < 2:
        return f"AICc tells the ceiling law and the log-linear law apart by {margin:.1f} only: either describes these points."
    better, worse = ("ceiling", "log-linear") if ceiling < line else ("log-linear", "ceiling")
    return f"AICc prefers the {better} law to the {worse} law by {margin:.1f}."


def _line(fitted: FitResult, sizes: Floats, size: str, fixed: float) -> Line:
    """The law over ``size``, drawn over the total parameters."""
    x = np.geomspace(sizes.min(), sizes.max(), 120)
    band = fitted.predict({size: x}, interval=BAND)
    return Line(f"{fitted.law} law", "-" if fitted.law == "ceiling" else "--", x + fixed, band.value, band.low, band.high)


def _curve(paradigm: str, x: Floats, y: Floats, lines: list[Line]) -> Curve:
    """``half``: the 90% interval of a rung's mean, from the variance within rungs pooled over the ladder."""
    rungs = [y[x == size] for size in np.unique(x)]
    return Curve(paradigm, x, y, np.unique(x), np.array([rung.mean() for rung in rungs]), pooled_half(rungs, BAND), lines)


def _figures(curves: list[Curve], rows: list[Row], lines: list[Floor], metric: str) -> dict[str, dict[str, bytes]]:
    """What each figure of a data set and protocol is over -> its files."""
    by_flops = []
    for curve in curves:
        runs = [row for row in rows if row["paradigm"] == curve.paradigm and (_number(row.get("train_flops")) or 0) > 0]
        if runs:
            by_flops.append(_flops_curve(runs, curve.paradigm, metric))
    over = [("parameters", "total parameters (counted)", curves), ("flops", "training FLOPs (counted)", by_flops)]
    return {kind: draw(found, lines, label, metric) for kind, label, found in over if found}


def _named(drawn: dict[str, dict[str, bytes]], dataset: str, protocol: str) -> list[dict[str, Any]]:
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{dataset}-{protocol}")
    return [
        {"name": f"{slug}-{kind}", "kind": kind, "dataset": dataset, "protocol": protocol, "files": files}
        for kind, files in drawn.items()
        if files
    ]


def _flops_curve(runs: list[Row], paradigm: str, metric: str) -> Curve:
    """Rungs by model: the FLOPs of its seeds may differ by a few rows, so a rung stands at their mean."""
    models = sorted({str(row["model"]) for row in runs})
    rungs = [[row for row in runs if str(row["model"]) == model] for model in models]
    mean_x = np.array([np.mean([row["train_flops"] for row in rung]) for rung in rungs])
    x = np.concatenate([np.full(len(rung), at) for rung, at in zip(rungs, mean_x, strict=True)])
    y = np.array([float(row[metric]) for rung in rungs for row in rung])
    curve = _curve(paradigm, x, y, [])
    flops = np.array([float(row["train_flops"]) for rung in rungs for row in rung])
    return Curve(paradigm, flops, y, curve.mean_x, curve.mean, curve.half)


def _failures(study_dir: Path, measured: set[str]) -> list[dict[str, str]]:
    """Points, and their other widths, without a measurement: those that failed, with reason and log, and those the plan has and
    nobody ran."""
    path, plan = study_dir / "failures.json", study_dir / "plan.json"
    reasons = {str(entry["point"]): entry for entry in read_json(path)} if path.is_file() else {}
    document = read_json(plan) if plan.is_file() else {}
    beams = {node["id"]: node["config"].get("beams") for node in document.get("nodes", ())}
    planned = []
    for point in document.get("points", ()):
        planned.append(str(point["run_id"]))
        if planned[-1] in measured:  # else its widths have nothing to be of
            planned += [width_name(planned[-1], beams[node]) for node in point.get("widths", ())]
    missing = [name for name in planned if name not in measured]
    found = [{"point": run_id, "reason": "not measured yet", "log": ""} | reasons.get(run_id, {}) for run_id in missing]
    return [{key: str(entry[key]) for key in ("point", "reason", "log")} for entry in found]


def _csv(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


__all__ = ["title", "verdict_lines", "write_report"]
