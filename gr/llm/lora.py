"""LoRA (arXiv 2106.09685) on all linear layers of a backbone's blocks, sized by rank or by share of counted parameters."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError

from gr.errors import UserError
from gr.files import read_json, write_json
from gr.llm.backbone import count


def per_rank(model: Any) -> int:
    """Adapter parameters per unit of rank, counted on a copy without memory: what peft adapts differs by architecture."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return count_lora(_adapted(type(model)(deepcopy(model.config)), rank=1, alpha=1, dropout=0.0))


def rank_for(model: Any, share: float) -> int:
    """The rank, at least 1, whose counted adapters come nearest ``share`` of the backbone's counted parameters."""
    return max(1, round(share * count(model).total / per_rank(model)))


def add_lora(
    model: Any,
    *,
    rank: int | None = None,
    share: float | None = None,
    alpha_per_rank: float = 2.0,
    dropout: float = 0.0,
    tokens: Sequence[int] = (),
) -> Any:
    """Freezes ``model`` and adds adapters of ``rank``, or of the rank nearest ``share``; returns the PeftModel.

    Seed torch before. An adapter's output is scaled by alpha / rank = ``alpha_per_rank``. ``tokens``: whose rows of the input and
    output embeddings are trained too, and saved with the adapters.
    """
    if rank is None:
        if share is None:
            raise ValueError("either rank or share")
        rank = rank_for(model, share)
    return _adapted(model, rank, alpha_per_rank * rank, dropout, tokens)


def _adapted(model: Any, rank: int, alpha: float, dropout: float, tokens: Sequence[int] = ()) -> Any:
    """peft's adapters on all linear layers but the output layer; UserError where it finds none."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        bias="none",
        trainable_token_indices=_rows(model, tokens) if len(tokens) else None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        words = " ".join(str(error).split())
        raise UserError(f"lora: a model of type {model.config.model_type!r} has no layer to adapt: {words}") from None


def _rows(model: Any, tokens: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """For peft, which finds an output layer that shares the input's table by itself, and any other by its name."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    if tables[0].weight is tables[1].weight:
        return list(tokens)
    return {name: list(tokens) for name, module in model.named_modules() if module in tables}


def count_lora(model: Any) -> int:
    """Counted adapter parameters."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the adapters and trained rows alone, as a PEFT folder with safetensors."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form for a model card, not filled in
    file = folder / "adapter_config.json"
    config = read_json(file)
    config["target_modules"] = sorted(config["target_modules"])  # a set, written in another order by each process
    write_json(file, config)


def merged(model: Any, folder: Path) -> Any:
    """``model`` in fp32 with the adapters of ``folder`` added into its weights; UserError when they are not of this model."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no PEFT adapter (adapter_model.safetensors) in it")
    model = model.float()  # an adapter is small beside the weights: added to bf16 ones it would be rounded away
    try:
        tuned = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{folder}: can't be loaded as an adapter of this backbone: {words}") from None
    return tuned.merge_and_unload()
