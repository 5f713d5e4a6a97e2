"""The metrics table: one row per evaluated point, written once and whole."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.graph import Node, Plan, Point
from cluster.identity import canonical
from cluster.spec import METRICS
from cluster.store import Store
from gr.metrics import COLD, RECALL_AT

EXPECTED = [f"expected_recall@{k}" for k in RECALL_AT]
SID_RECALL = [f"sid_recall@{k}" for k in RECALL_AT]
COLD_METRICS = [f"{name}_cold" for name in COLD]
SIZES = ("n_rs", "n_llm", "n_qt", "n_lora", "n_cf", "n_total", "n_non_embedding")

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("study", "run_id", "dataset", "protocol", "paradigm", "model")]
    + [("seed", pa.int64())]
    + [(name, pa.int64()) for name in SIZES]
    + [("users", pa.int64()), ("interactions", pa.int64()), ("train_tokens", pa.int64())]
    + [(name, pa.float64()) for name in ("train_flops", "infer_flops_per_user", "train_seconds", "eval_seconds")]
    + [("users_per_second", pa.float64()), ("peak_memory_bytes", pa.int64()), ("loss_val", pa.float64())]
    + [(name, pa.float64()) for name in METRICS]
    + [("inject", pa.string()), ("data_fraction", pa.float64()), ("status", pa.string())]
    + [("lr", pa.float64()), ("lr_choice", pa.string()), ("init", pa.string()), ("steps", pa.int64())]
    + [("collision_rate", pa.float64()), ("invalid_beams", pa.float64()), ("beams", pa.int64())]
    + [
        ("encoder_init", pa.string()),
        ("evaluated_users", pa.int64()),
        ("started", pa.string()),
        ("host", pa.string()),
        ("device", pa.string()),
    ]
    + [("versions", pa.string()), ("launch", pa.string()), ("evaluation", pa.string())]
    + [("evaluated_part", pa.string()), ("loss_unit", pa.string())]
    + [(name, pa.float64()) for name in EXPECTED]
    + [("shared_titles_policy", pa.string())]
    + [(name, pa.int64()) for name in ("items_with_shared_title", "empty_titles", "truncated_titles")]
    + [(name, pa.string()) for name in ("architecture", "encoder", "quantizer", "collisions", "tune")]
    + [("n_trained", pa.int64())]
    + [(name, pa.float64()) for name in ("reconstruction_error", "identity_bits", "probe_embedding_r2", *SID_RECALL)]
    + [("users_cold", pa.int64()), *((name, pa.float64()) for name in COLD_METRICS)]
    + [("title_score", pa.string()), ("input", pa.string())]
)
"""The table's columns; null where one does not apply. Sizes are counted parameters, times seconds, memory bytes.

``evaluated_part``: "test" or "val"; ``loss_unit``: what ``loss_val`` is a mean over, and so comparable within a paradigm only;
``expected_recall@k``: of the planted world's optimum, free of the targets' luck; ``sid_recall@k``: of SIDs without their extra
digit, which is no recall of items (docs/sid.md has the other columns of tokenizers); ``users_cold`` and the metrics that end with
``_cold``: of users whose target has few training interactions (`gr.metrics.COLD_AT`);
``title_score``: what ranked an LLM's titles; ``input``: what an LLM reads, "titles", "sids" or "both".
"""

WIDTHS = pa.schema(
    [(name, SCHEMA.field(name).type) for name in ("study", "run_id", "dataset", "protocol", "paradigm", "model", "seed", "beams")]
    + [(name, SCHEMA.field(name).type) for name in (*METRICS, "invalid_beams", "infer_flops_per_user", "users_per_second")]
    + [(name, SCHEMA.field(name).type) for name in ("eval_seconds", "evaluated_users", "evaluated_part", "evaluation")]
)
"""Columns of widths.parquet, as in `SCHEMA`: a row per evaluation of a point that has several widths, the point's own among them.
Metrics @k with k over ``beams`` are null."""

_TRAIN = ["n_non_embedding", "train_tokens", "train_flops", "train_seconds", "peak_memory_bytes", "loss_val"]
_TRAIN += ["lr", "steps", "device"]
_EVALUATE = ["infer_flops_per_user", "eval_seconds", "users_per_second", "invalid_beams", "beams", "evaluated_users", *METRICS]
_EVALUATE += ["users_cold", *COLD_METRICS]
_QUANTIZE = ["quantizer", "collisions", "reconstruction_error", "identity_bits", "probe_embedding_r2"]
_TITLES = ["shared_titles_policy", "title_score", "items_with_shared_title", "empty_titles", "truncated_titles"]
_SOURCES: dict[str, tuple[tuple[str, list[str]], ...]] = {
    "sid": (
        ("encode", ["n_llm", "encoder_init", "encoder"]),
        ("quantize", ["n_qt", "collision_rate", *_QUANTIZE]),
        ("train_sid", ["n_rs", "init", "architecture", *_TRAIN]),
        ("evaluate_sid", [*SID_RECALL, *_EVALUATE]),
    ),
    "llm": (
        ("train_llm", ["n_llm", "n_lora", "n_trained", "tune", "input", "init", *_TRAIN]),
        ("evaluate_llm", [*_TITLES, *_EVALUATE]),
    ),
    "cf": (("baseline", ["n_cf", "train_seconds", "peak_memory_bytes", "device", *EXPECTED, *_EVALUATE]),),
}
"""Which stage of a point each column comes from: a study's encoder is trained too, but its loss is not the point's."""
_LOSS_UNIT = {"sid": "nats per item", "llm": "nats per title token"}
_TOTAL = {"sid": ("n_rs", "n_llm", "n_qt"), "llm": ("n_llm", "n_lora"), "cf": ("n_cf",)}


def row(store: Store, plan: Plan, point: Point) -> dict[str, Any]:
    """The point's row from the manifests of the stages it stands on. FileNotFoundError when one of them is missing."""
    found: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    nodes: dict[str, tuple[Node, dict[str, Any]]] = {}
    for node in plan.upstream(point):
        manifest = store.manifest(node)
        if manifest is None:
            raise FileNotFoundError(f"{store.artifact(node)}: not finished")
        nodes[node.stage] = (node, manifest)
    for stage, columns in _SOURCES[point.paradigm]:
        facts = nodes[stage][1]["facts"]
        found.update({column: facts[column] for column in columns if facts.get(column) is not None})
    if isinstance(found["probe_embedding_r2"], list):  # of the first level, the first two, ...: the table's is that of all
        found["probe_embedding_r2"] = found["probe_embedding_r2"][-1]
    last_node, last = nodes[plan.nodes[point.nodes[-1]].stage]
    first_node, first = nodes[plan.nodes[point.nodes[0]].stage]
    counts = nodes["prepare"][1]["facts"]
    sizes = [found[name] for name in _TOTAL[point.paradigm]]
    found.update(
        study=plan.study.study,
        run_id=point.run_id,
        dataset=point.dataset,
        protocol=point.protocol,
        paradigm=point.paradigm,
        model=point.model,
        seed=point.seed,
        n_total=sum(sizes) if None not in sizes else None,
        users=counts["users"],
        interactions=counts["interactions"],
        inject="none",
        data_fraction=1.0,
        status="ok",
        evaluated_part=last_node.config["which"],
        loss_unit="nats per SID token" if found["input"] == "sids" else _LOSS_UNIT.get(point.paradigm),
        # The study's present words: the manifest has those of the study that trained it, which may have stated it otherwise.
        lr_choice=first_node.config.get("optimizer", {}).get("lr_choice"),
        started=last["started"],
        host=last.get("host"),
        versions=canonical(last["versions"]),
        launch=canonical(first["launch"]),
        evaluation=str(store.artifact(last_node).relative_to(store.folder)),
    )
    return found


def write_row(store: Store, plan: Plan, point: Point) -> None:
    """Writes the point's row aside and renames it into place."""
    _write(store.row(point), pa.Table.from_pylist([row(store, plan, point)], SCHEMA))


def _write(path: Path, table: pa.Table) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, aside)
    aside.replace(path)


def read_row(path: Path) -> dict[str, Any] | None:
    """The row in a file; None where there is none or it is damaged, and must be written again."""
    rows = read_rows(path)
    return rows[0] if rows else None


def read_rows(path: Path) -> list[dict[str, Any]] | None:
    """A table's rows; None where there is none or it is damaged, and must be written again."""
    try:
        return list(pq.read_table(path).to_pylist())
    except (pa.ArrowException, OSError):
        return None


def width_rows(store: Store, plan: Plan) -> list[dict[str, Any]]:
    """The rows of widths.parquet, of the evaluations that are finished: by point as in the plan, then by width."""
    found = []
    for point in plan.points:
        for node in sorted((point.nodes[-1], *point.widths) if point.widths else (), key=plan.beams):
            manifest = store.manifest(plan.nodes[node])
            if manifest is None:
                continue
            where = {name: getattr(point, name) for name in ("run_id", "dataset", "protocol", "paradigm", "model", "seed")}
            known = where | {
                "study": plan.study.study,
                "beams": plan.beams(node),
                "evaluated_part": plan.nodes[node].config["which"],
                "evaluation": str(store.artifact(plan.nodes[node]).relative_to(store.folder)),
            }
            found.append({name: known.get(name, manifest["facts"].get(name)) for name in WIDTHS.names})
    return found


def _refresh_widths(store: Store, plan: Plan) -> None:
    """Writes widths.parquet anew where it is not what the artifacts say; removes it where no point has several widths."""
    rows = width_rows(store, plan)
    if not rows:
        store.widths.unlink(missing_ok=True)
    elif read_rows(store.widths) != rows:
        _write(store.widths, pa.Table.from_pylist(rows, WIDTHS))


def refresh_rows(store: Store, plan: Plan) -> None:
    """Writes the row of every finished point that has none, or one in other words or with other columns than it has now, and
    the table of widths."""
    for point in plan.points:
        finished = all(store.done(node) for node in plan.upstream(point))
        if finished and read_row(store.row(point)) != row(store, plan, point):
            write_row(store, plan, point)
    _refresh_widths(store, plan)


def write_missing_rows(store: Store, plan: Plan, points: Iterable[Point]) -> None:
    """Writes the row of each of ``points`` whose stages are all finished and that has none."""
    for point in points:
        if not store.row(point).is_file() and all(store.done(node) for node in plan.upstream(point)):
            write_row(store, plan, point)
