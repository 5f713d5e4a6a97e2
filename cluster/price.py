"""What a study will cost, before it runs: parameters counted from the real modules, FLOPs, memory, devices, time."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from rich.table import Table

from cluster import cost
from cluster.graph import Node, Plan
from cluster.progress import duration
from cluster.store import Store
from cluster.tuning import UNKNOWN, open_trials
from gr.count import count_parameters
from gr.llm.backbone import fresh_backbone
from gr.sid.decoder_only import decoder_only
from gr.sid.encoder import fresh_encoder
from gr.sid.recommender import t5
from jobs.config import STAGES
from jobs.sid_config import TrainSidConfig
from jobs.sid_recipes import tables_of


@dataclass(frozen=True)
class Price:
    """``None`` where it can't be known before the run (a model from outside, whose sizes are on the hub)."""

    n_parameters: int | None
    n_non_embedding: int | None
    flops: float
    bytes: int
    processes: int
    threads: int
    gpus: int
    seconds: float
    done: bool


def price_node(plan: Plan, node: Node, done: bool) -> Price:
    """Prices one stage, roughly: see `cluster.cost.tokens` and `cluster.cost.flops`.

    Memory: weights, gradients and Adam's two moments in fp32 (16 bytes per trained weight), without activations.
    """
    facts = cost.facts_of(plan, node)
    sized = cost.size_of(plan, node)
    if sized is None:
        return Price(None, None, 0.0, cost.PROGRAM_BYTES, node.processes, node.threads, node.gpus, cost.seconds(plan, node), done)
    total, non_embedding = _count(*sized, plan, node, facts)
    flops = cost.flops(node, sized[0], non_embedding, cost.tokens(plan, node, facts))
    rate = plan.study.resources.flops_per_second * node.processes * node.threads
    memory = node.processes * (cost.PROGRAM_BYTES + total * (16 if cost.trains_all(node) else 4))
    start = cost.START.get(node.stage, cost.START_TORCH)
    return Price(
        total,
        non_embedding,
        flops,
        memory,
        node.processes,
        node.threads,
        node.gpus,
        start + flops / rate,
        done,
    )


def _count(stage: str, size: dict[str, Any], plan: Plan, node: Node, facts: cost.Facts) -> tuple[int, int]:
    vocab, longest = 0, 0
    if stage in ("train_sid", cost.DECODER_ONLY):
        quantize = cost.upstream_config(plan, node, "quantize")
        assert quantize is not None
        # Padding, each level's codes, and the last digit: at least as many as the items that share one SID, unknown before.
        vocab = 1 + quantize["levels"] * quantize["width"] + max(1, facts.items // quantize["width"] ** quantize["levels"])
        size = size | tables_of(TrainSidConfig.model_validate(cost.upstream_config(plan, node, "train_sid")))
    else:
        config = cost.upstream_config(plan, node, stage)
        assert config is not None
        vocab, longest = config["vocab"], config["max_tokens"]
    return _built(stage, tuple(size.items()), vocab, longest)


@lru_cache
def _built(stage: str, size: tuple[tuple[str, int], ...], vocab: int, longest: int) -> tuple[int, int]:
    """(all, non-embedding) parameters of the stage's module, built on the meta device: no memory, no time."""
    sizes: dict[str, Any] = dict(size)
    with torch.device("meta"):
        if stage == "train_sid":
            model: Any = t5(vocab, **sizes, dropout=0.0)
        elif stage == cost.DECODER_ONLY:
            model = decoder_only(vocab, **sizes, dropout=0.0)
        elif stage == "train_encoder":
            model = fresh_encoder(vocab, **sizes, max_tokens=longest)
        else:
            model = fresh_backbone(vocab, **sizes)
    return count_parameters(model)


def price(plan: Plan, store: Store | None) -> dict[str, Any]:
    """The priced plan as one JSON document."""
    document = plan.document()
    trials = {trial.nodes[-1] for trial in plan.trials}
    ended = trials - {trial.nodes[-1] for trial in open_trials(plan, store)} if store else set()
    for entry, node in zip(document["nodes"], plan.nodes.values(), strict=True):
        entry["price"] = asdict(price_node(plan, node, node.id in ended or (store is not None and store.done(node))))
        if unknown(node):
            entry["config"]["optimizer"]["lr"] = None
    document["pending"] = waiting(plan)
    swept = [entry["price"] for entry in document["nodes"] if entry["id"] in trials and not entry["price"]["done"]]
    document["sweep_seconds"] = sum(price["seconds"] for price in swept)
    document["sweep_flops"] = sum(price["flops"] for price in swept)
    document["seconds"] = sum(entry["price"]["seconds"] for entry in document["nodes"] if not entry["price"]["done"])
    document["flops"] = sum(entry["price"]["flops"] for entry in document["nodes"] if not entry["price"]["done"])
    return document


def unknown(node: Node) -> bool:
    """Whether the node's learning rate stands for one that a sweep will tell."""
    return bool(node.config.get("optimizer", {}).get("lr_choice") == UNKNOWN)


def waiting(plan: Plan) -> list[str]:
    """The points of a priced plan whose learning rate is not known yet; their run_ids are not the final ones."""
    return [point.run_id for point in plan.points if any(unknown(node) for node in plan.upstream(point))]


def table(plan: Plan, document: dict[str, Any], slots: int) -> Table:
    """One line per kind of stage and rung, its seeds together."""
    left = sum(not entry["price"]["done"] for entry in document["nodes"])
    wall = document["seconds"] / slots
    found = Table(
        title=f"{plan.study.study}: {len(plan.points)} points, {len(plan.nodes)} stages ({left} to run), "
        f"{document['flops']:.2g} FLOPs, about {duration(wall)} on {slots} cores",
        title_justify="left",
        caption="FLOPs: 6 per non-embedding weight and token (4 under LoRA, 2 at inference, half in T5); memory: no activations; "
        f"time at {plan.study.resources.flops_per_second:.2g} FLOP/s per thread" + _sweep_words(document, slots),
        caption_justify="left",
    )
    for name in ("stage", "runs", "done", "parameters", "non-embedding", "FLOPs each", "memory", "devices", "time each"):
        found.add_column(name, justify="left" if name in ("stage", "devices") else "right")
    rungs = {node: f"{p.paradigm} {p.model}" for p in plan.points for node in p.nodes}
    rungs |= {node: f"{p.paradigm} {p.model}, {plan.beams(node)} beams" for p in plan.points for node in p.widths}
    rungs |= {node: f"{trial.sweep} lr sweep" for trial in plan.trials for node in trial.nodes}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in document["nodes"]:
        size = entry["config"].get("size")
        shared = f"{size['layers']} x {size['d_model']}" if size else ""
        groups.setdefault((entry["stage"], rungs.get(entry["id"], shared)), []).append(entry["price"])
    for stage in STAGES:
        for (kind, rung), prices in groups.items():
            if kind != stage:
                continue
            p = prices[0]
            devices = f"{p['processes']} x {p['threads']} CPU" + (f", {p['gpus']} GPU" if p["gpus"] else "")
            found.add_row(
                f"{kind} {rung}".strip(),
                str(len(prices)),
                str(sum(q["done"] for q in prices) or ""),
                *(f"{p[key]:,}" if p[key] is not None else "" for key in ("n_parameters", "n_non_embedding")),
                f"{p['flops']:.2g}" if p["flops"] else "",
                f"{p['bytes'] / 2**20:,.0f} MB",
                devices,
                duration(max(q["seconds"] for q in prices)),
            )
    return found


def _sweep_words(document: dict[str, Any], slots: int) -> str:
    if not document["pending"]:
        return ""
    return (
        f"\nthe sweep of learning rates has not run: {document['sweep_flops']:.2g} FLOPs of the above, about "
        f"{duration(document['sweep_seconds'] / slots)}; it comes first, and tells the rates of {len(document['pending'])} points"
    )
