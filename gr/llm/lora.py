"""LoRA (arXiv 2106.09685) on all linear layers of a backbone's blocks, sized by rank or by share of counted parameters."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from gr.errors import UserError
from gr.llm.backbone import count


def per_rank(model: Any) -> int:
    """Adapter parameters per unit of rank: the sum of inputs + outputs over the linear layers but the output layer."""
    head = model.get_output_embeddings()
    return sum(m.in_features + m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def rank_for(model: Any, share: float) -> int:
    """The rank, at least 1, whose counted adapters come nearest ``share`` of the backbone's counted parameters."""
    return max(1, round(share * count(model).total / per_rank(model)))


def add_lora(
    model: Any, *, rank: int | None = None, share: float | None = None, alpha_per_rank: float = 2.0, dropout: float = 0.0
) -> Any:
    """Freezes ``model`` and adds adapters of ``rank``, or of the rank nearest ``share``; returns the PeftModel.

    Seed torch before. An adapter's output is scaled by alpha / rank = ``alpha_per_rank``.
    """
    if rank is None:
        if share is None:
            raise ValueError("either rank or share")
        rank = rank_for(model, share)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha_per_rank * rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        bias="none",
    )
    return get_peft_model(model, config)


def count_lora(model: Any) -> int:
    """Counted adapter parameters."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the adapters alone, as a PEFT folder with safetensors."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def merged(model: Any, folder: Path) -> Any:
    """``model`` with the adapters of ``folder`` added into its weights."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no PEFT adapter (adapter_model.safetensors) in it")
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
