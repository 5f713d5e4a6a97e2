"""What a stage will roughly cost, without torch: enough to start the longest work first and to say how long it will take.

`cluster.price` replaces the parameters by counted ones.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cluster.graph import Node, Plan
from gr.data.dataset import Dataset

START = {"plant": 2.0, "prepare": 2.0, "baseline": 2.0}
"""Seconds until a stage's program is loaded, where it needs no torch."""
START_TORCH = 7.0
PROGRAM_BYTES = 500 << 20
"""A process with torch and transformers loaded."""
DECODER_ONLY = "train_sid, decoder-only"
"""In place of the stage, where its architecture counts."""
TEXT_TOKENS = 10
"""Tokens of an item's text, where nothing is known of it."""


@dataclass(frozen=True)
class Facts:
    """What is known of the data before anything ran."""

    users: int
    items: int
    interactions: int


def facts_of(plan: Plan, node: Node) -> Facts:
    """The counts of the data set that a stage stands on."""
    at = node
    while at.stage != "plant":
        source = at.inputs.get("dataset") or at.inputs.get("split") or next(iter(at.inputs.values()))
        if source not in plan.nodes:
            return _counted(source)
        at = plan.nodes[source]
    world = at.config["world"]
    return Facts(world["users"], world["items"], round(world["users"] * world["mean_length"]))


@cache
def _counted(folder: str) -> Facts:
    counts = Dataset(Path(folder)).counts
    return Facts(counts["users"], counts["items"], counts["interactions"])


def layers_parameters(stage: str, size: dict[str, Any]) -> int:
    """Weights of the layers (no embeddings): 4 d^2 of attention, 3 d d_ff of a gated or 2 d d_ff of a plain feed-forward net."""
    d, layers, d_ff = size["d_model"], size["layers"], size["d_ff"]
    if stage == "train_sid":
        inner = size["heads"] * size["d_kv"]
        return int(layers * ((4 + 8) * d * inner + 2 * 2 * d * d_ff))  # the decoder attends twice
    if stage == DECODER_ONLY:
        return int(layers * (4 * d * size["heads"] * size["d_kv"] + 3 * d * d_ff))
    return int(layers * (4 * d * d + 3 * d * d_ff))


def upstream_config(plan: Plan, node: Node, stage: str) -> dict[str, Any] | None:
    """The configuration of the nearest stage of that name among the node and what it stands on."""
    todo = [node]
    while todo:
        at = todo.pop(0)
        if at.stage == stage:
            return at.config
        todo += [plan.nodes[i] for i in at.inputs.values() if i in plan.nodes]
    return None


def tokens(plan: Plan, node: Node, facts: Facts) -> int:
    """Tokens that pass through the model, an upper bound: every history as long as the data's mean allows."""
    config = node.config
    history = max(1, min(config.get("max_history", 20), facts.interactions // max(1, facts.users)))
    units = config["optimizer"]["steps"] * config["optimizer"]["global_batch"] if "optimizer" in config else 0
    quantize = upstream_config(plan, node, "quantize")
    digits = quantize["levels"] + 1 if quantize else 0
    users = config.get("users") or facts.users
    reads = upstream_config(plan, node, "train_sid") or {}
    read = int(reads.get("user_tokens", 0) > 0) + history * (digits + int(reads.get("separator", False)))
    if node.stage == "train_sid":
        return int(units * (read + digits))
    if node.stage == "evaluate_sid":
        return int(users * (read + digits * config["beams"]))
    if node.stage == "train_llm":
        return int(units * min(config["max_tokens"], (history + 1) * TEXT_TOKENS))
    if node.stage == "evaluate_llm":
        return int(users * TEXT_TOKENS * (history + config["beams"]))
    if node.stage in {"train_encoder", "pretrain_llm"}:
        return int(units * min(config["max_tokens"], TEXT_TOKENS))
    if node.stage == "encode":
        return int(facts.items * min(config["max_tokens"], TEXT_TOKENS))
    return 0


def size_of(plan: Plan, node: Node) -> tuple[str, dict[str, Any]] | None:
    """The training stage (or `DECODER_ONLY`) whose model this stage runs, and its sizes; None where it runs none, or one from
    outside."""
    stage = {"evaluate_sid": "train_sid", "encode": "train_encoder", "evaluate_llm": "pretrain_llm"}.get(
        node.stage, "pretrain_llm" if node.stage == "train_llm" else node.stage
    )
    config = upstream_config(plan, node, stage)
    if not config or "size" not in config:
        return None
    return (DECODER_ONLY if config.get("architecture") == "decoder-only" else stage, config["size"])


def trains_all(node: Node) -> bool:
    """Whether the stage trains every weight of its model."""
    return node.stage in {"train_sid", "train_encoder", "pretrain_llm"} or node.config.get("tune") == "full"


def flops(node: Node, kind: str, n_parameters: int, n_tokens: int) -> float:
    """Of a stage that runs a model of ``kind`` (`size_of`).

    6 per weight and token for training, 2 for inference (Kaplan et al. 2020, section 2.1). LoRA needs no gradients of the frozen
    weights: 4 per weight and token. In an encoder-decoder a token passes one of the two stacks: half.
    """
    per = {"train_sid": 3, "evaluate_sid": 1, "train_encoder": 6, "pretrain_llm": 6}.get(node.stage, 2)
    if node.stage == "train_llm":
        per = 6 if trains_all(node) else 4
    return float(per * n_parameters * n_tokens) * (2 if kind == DECODER_ONLY else 1)


def seconds(plan: Plan, node: Node) -> float:
    """A rough time, for the order of the work and the time left."""
    start = START.get(node.stage, START_TORCH)
    facts = facts_of(plan, node)
    size = size_of(plan, node)
    if size is None:
        return start + facts.interactions * 2e-5
    rate = plan.study.resources.flops_per_second * node.processes * node.threads
    return start + flops(node, size[0], layers_parameters(*size), tokens(plan, node, facts)) / rate


def memory(plan: Plan, node: Node) -> int:
    """Bytes that one process of a stage holds: for room on a machine, so rather too many than too few.

    The program; weights, and where they are trained gradients and Adam's two moments, in fp32, or this process's share of them by
    ZeRO; activations of 68 bytes per token, layer and width (Korthikanti et al. 2022, equation 1, in fp32, without attention's
    scores) where they are kept for a gradient; and the logits of a batch, three times.
    """
    sized = size_of(plan, node)
    if sized is None:
        return PROGRAM_BYTES + _model_bytes(node)
    stage, size = sized
    sids = stage in ("train_sid", DECODER_ONLY)
    config, upstream = node.config, upstream_config(plan, node, "quantize" if sids else stage)
    assert upstream is not None
    vocab = upstream["levels"] * upstream["width"] if sids else upstream["vocab"]
    parameters = layers_parameters(stage, size) + 2 * vocab * size["d_model"]
    if sids and (reads := upstream_config(plan, node, "train_sid")):
        parameters += reads.get("user_tokens", 0) * size["d_model"]
    facts = facts_of(plan, node)
    passed = tokens(plan, node, facts)
    if "optimizer" in config:
        batch = passed / config["optimizer"]["steps"] / node.processes / node.launch.get("accumulation", 1)
        layers = size["layers"]
    else:
        units = facts.items if node.stage == "encode" else config["users"] or facts.users
        batch = passed / units * config["batch"]
        layers = 1
    held = 4.0
    if trains_all(node):
        zero, n = node.launch.get("zero", 0), node.processes
        held = 4 / (n if zero == 3 else 1) + 4 / (n if zero >= 2 else 1) + 8 / (n if zero else 1)
    return int(PROGRAM_BYTES + parameters * held + batch * (68 * layers * size["d_model"] + 12 * vocab))


def _model_bytes(node: Node) -> int:
    """Of a model from outside that lies in a folder; one from the hub is not known before the run."""
    folder = Path(node.config.get("model") or "")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if node.config.get("model") else 0
