"""The report's page: tables of strings for the template."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from cluster.figures import FLOOR_NAMES, NAMES, OPTIMUM
from cluster.report_words import asides, bands, best, evaluated, expectation
from gr.metrics import COLD, COLD_AT

Row = dict[str, Any]

SIZES = ("n_rs", "n_llm", "n_qt", "n_lora", "n_cf", "n_total", "n_non_embedding")
METRICS = ("recall@1", "recall@5", "recall@10", "recall@20", "ndcg@10")
_WORDS = ("init", "tune", "architecture", "encoder_init", "quantizer", "lr_choice")
_RATES = ("collision_rate", "invalid_beams")
_TOKENIZER = ("sid_recall@10", "reconstruction_error", "identity_bits")


def page(
    report: dict[str, Any],
    rows: list[Row],
    figures: list[dict[str, Any]],
    failures: list[dict[str, str]],
    study_dir: Path,
    widths: list[Row],
) -> str:
    """index.html as text, with the figures inside; ``widths``: the rows of widths.parquet."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = []
    for dataset, protocol in sorted({(row["dataset"], row["protocol"]) for row in rows}):
        here = [row for row in rows if (row["dataset"], row["protocol"]) == (dataset, protocol)]
        groups = [g for g in report["groups"] if (g["dataset"], g["protocol"]) == (dataset, protocol)]
        sections.append(
            {
                "title": f"{dataset}, {protocol}",
                "evaluated": evaluated(here),
                "groups": [_group(g, [row for row in here if row["paradigm"] == g["paradigm"]]) for g in groups],
                "best": best(here, report["metric"], study_dir),
                "bands": bands(groups),
                "repeats": any(not _one_seed([r for r in here if r["paradigm"] == g["paradigm"]]) for g in groups),
                "expected": expectation([row for row in here if row["model"] == OPTIMUM], report["metric"]) is not None,
                "figures": [f for f in figures if (f["dataset"], f["protocol"]) == (dataset, protocol)],
                "points": _points(here),
                "runs": _runs(here),
                "cold": _cold(here),
                "widths": _widths(
                    [g for g in report.get("widths", ()) if (g["dataset"], g["protocol"]) == (dataset, protocol)],
                    [row for row in widths if (row["dataset"], row["protocol"]) == (dataset, protocol)],
                    {row["run_id"]: row.get("beams") for row in here},
                ),
            }
        )
    return environment.get_template("report.html.j2").render(
        report=report, sections=sections, machines=_machines(rows), failures=failures, one_seed=_one_seed(rows)
    )


def _group(group: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    from fit import explain

    laws = [
        {
            "name": law["law"],
            "formula": law["formula"],
            "params": [
                {
                    "name": name,
                    "value": f"{p['value']:.4g}",
                    "interval": f"{p['low']:.4g} to {p['high']:.4g}" if "low" in p else "–",
                }
                for name, p in law["params"].items()
            ],
            "objective": f"{law['objective']:.4g}",
            "aicc": f"{law['aicc']:.1f}" if law["aicc"] is not None else "–",
            "warnings": [explain(code) for code in law["warnings"]] or ["none"],
        }
        for law in group["laws"]
    ]
    verdict = group["verdict"]
    lack_of_fit = any(code.startswith("lack-of-fit") for code in verdict["warnings"]) if verdict else False
    return {
        "name": NAMES[group["paradigm"]],
        "paradigm": group["paradigm"],
        "size": group["size"],
        "fixed": _size(group["fixed"]) if group["fixed"] else "",
        "verdict": verdict["verdict"] if verdict else "no verdict",
        "words": verdict["reason"] if verdict else group["words"],
        "asides": asides(rows, group["paradigm"], lack_of_fit),
        "comparison": group.get("comparison", ""),
        "notes": list(dict.fromkeys(group["notes"])),
        "laws": laws,
    }


def _points(rows: list[Row]) -> dict[str, Any]:
    """One line per rung, seeds averaged, ladders first and floors last; columns that no row has are left out."""
    keys = list(dict.fromkeys((r["paradigm"], str(r["model"])) for r in rows))
    rungs = [[r for r in rows if (r["paradigm"], str(r["model"])) == key] for key in keys]
    columns: list[tuple[str, list[str]]] = [
        ("paradigm", [NAMES.get(p, "floor" if p == "cf" else p) if m != OPTIMUM else "optimum" for p, m in keys]),
        ("rung", [FLOOR_NAMES.get(m, m) if p not in NAMES else m for p, m in keys]),
        ("seeds", [str(len(rung)) for rung in rungs]),
    ]
    columns += [(name, [_size(_mean(rung, name)) for rung in rungs]) for name in SIZES]
    columns += [("train_flops", [_plain(_mean(rung, "train_flops"), ".3g") for rung in rungs])]
    columns += [("train_seconds", [_plain(_mean(rung, "train_seconds"), ".1f") for rung in rungs])]
    columns += [(name, [_metric(rung, name) for rung in rungs]) for name in METRICS]
    columns += [("loss_val", [_spread(rung, "loss_val") for rung in rungs])]
    columns += [("loss_unit", [_text(rung, "loss_unit") for rung in rungs])]
    columns += [(name, [_plain(_mean(rung, name), ".2%") for rung in rungs]) for name in _RATES]
    columns += [(name, [_plain(_mean(rung, name), ".4g") for rung in rungs]) for name in _TOKENIZER]
    columns += [(name, [_text(rung, name) for rung in rungs]) for name in _WORDS]
    kept = [(name, cells) for name, cells in columns if any(cells)]
    return {"names": [name for name, _ in kept], "rows": [list(cells) for cells in zip(*(c for _, c in kept), strict=True)]}


def _cold(rows: list[Row]) -> dict[str, Any]:
    """One line per rung, of the users whose target has few training interactions; no rows where none has a metric of them."""
    keys = list(dict.fromkeys((r["paradigm"], str(r["model"])) for r in rows if r.get(f"{COLD[0]}_cold") is not None))
    cells = []
    for paradigm, model in keys:
        rung = [r for r in rows if (r["paradigm"], str(r["model"])) == (paradigm, model)]
        name = model if paradigm in NAMES else FLOOR_NAMES.get(model, model)
        metrics = [_spread(rung, metric) for cold in COLD for metric in (f"{cold}_cold", cold)]
        what = NAMES.get(paradigm, "optimum" if model == OPTIMUM else "floor")
        cells.append([what, name, _size(_mean(rung, "users_cold")), *metrics])
    heads = [head for cold in COLD for head in (f"{cold}, cold", f"{cold}, all")]
    return {"names": ["paradigm", "rung", "users with a cold target", *heads], "rows": cells, "most": COLD_AT}


def _widths(groups: list[dict[str, Any]], rows: list[Row], measured_with: dict[str, int | None]) -> dict[str, Any]:
    """One line per rung and width; ``measured_with``: the width of each point's own measurement, which is marked."""
    cells = []
    for group in groups:
        for rung in group["rungs"]:
            own = [r for r in rows if (r["paradigm"], str(r["model"])) == (group["paradigm"], rung["model"])]
            for width in rung["widths"]:
                here = [r for r in own if r["beams"] == width["beams"]]
                mark = " (the points')" if any(measured_with[r["run_id"]] == r["beams"] for r in here) else ""
                head = [NAMES.get(group["paradigm"], group["paradigm"]), rung["model"], f"{width['beams']:,}{mark}"]
                cost = [_plain(width["users_per_second"], ".4g"), _plain(width["infer_flops_per_user"], ".3g")]
                found = [_spread(here, name) for name in METRICS]
                cells.append([*head, str(width["seeds"]), *found, *cost, _plain(_mean(here, "invalid_beams"), ".2%")])
    names = ["paradigm", "rung", "beams", "seeds", *METRICS, "users/s", "FLOPs per user", "invalid beams"]
    return {"names": names, "rows": cells, "words": [rung["words"] for group in groups for rung in group["rungs"]]}


def _runs(rows: list[Row]) -> dict[str, Any]:
    names = [
        "run_id",
        "paradigm",
        "model",
        "seed",
        "n_total",
        "train_flops",
        "train_seconds",
        *METRICS,
        "loss_val",
        "loss_unit",
        "lr",
    ]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    return {"names": names, "rows": [[_cell(row.get(name)) for name in names] for row in rows]}


def _machines(rows: list[Row]) -> list[dict[str, str]]:
    """What was run on what: distinct (host, device, launch, versions) with the number of points of each."""
    found: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        key = (_cell(row.get("host")), _cell(row.get("device")), _json(row.get("launch")), _json(row.get("versions")))
        if any(key):
            found[key] = found.get(key, 0) + 1
    return [
        {"host": host, "device": device, "launch": launch, "versions": versions, "points": str(count)}
        for (host, device, launch, versions), count in sorted(found.items())
    ]


def _one_seed(rows: list[Row]) -> bool:
    counts: dict[tuple[Any, ...], int] = {}
    for row in rows:
        if row["paradigm"] in NAMES:
            key = (row["dataset"], row["protocol"], row["paradigm"], row["model"])
            counts[key] = counts.get(key, 0) + 1
    return bool(counts) and max(counts.values()) == 1


def _values(rung: list[Row], name: str) -> list[float]:
    return [float(r[name]) for r in rung if isinstance(r.get(name), int | float) and np.isfinite(r[name])]


def _mean(rung: list[Row], name: str) -> float | None:
    values = _values(rung, name)
    return float(np.mean(values)) if values else None


def _spread(rung: list[Row], name: str) -> str:
    """Mean ± standard deviation over seeds."""
    values = _values(rung, name)
    if not values:
        return ""
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def _metric(rung: list[Row], name: str) -> str:
    """`_spread`; of the planted world's optimum the exact expectation first, what these users realised beside it."""
    realised, expected = _spread(rung, name), expectation(rung, name)
    if str(rung[0]["model"]) != OPTIMUM or not realised:
        return realised
    return f"{realised} (realised)" if expected is None else f"{expected:.4f} (realised {realised})"


def _plain(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(value: float | None) -> str:
    """A counted size in full up to a million, then rounded: 42,016 or 13.2M."""
    if value is None:
        return ""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}"


def _text(rung: list[Row], name: str) -> str:
    return ", ".join(sorted({str(r[name]) for r in rung if r.get(name) is not None}))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _json(value: Any) -> str:
    """A JSON object as `name value, ...`; other text as it is."""
    try:
        content = json.loads(value)
    except (TypeError, ValueError):
        return _cell(value)
    return ", ".join(f"{k} {v}" for k, v in sorted(content.items())) if isinstance(content, dict) else str(value)
