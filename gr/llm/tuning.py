"""What of a backbone is trained: adapters, all of it, or its output layer; and its control with random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from gr.llm.backbone import Counts, forward_flops, load_backbone, train_flops
from gr.llm.lora import add_lora, count_lora, merged, save_adapter
from gr.llm.shown import grow

BACKBONE, MERGED = "backbone", "merged"


def randomised(model: Any) -> Any:
    """The same architecture with weights drawn anew, as its own initialisation draws them. Seed torch before."""
    fresh = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa", trust_remote_code=False)
    return fresh.to(dtype=model.dtype).eval()


def made_trainable(model: Any, tune: str, lora: dict[str, Any] | None, tokens: Sequence[int] = ()) -> Any:
    """The module to train for ``tune``: a PeftModel with adapters and ``tokens``' own rows, or ``model`` itself with all or only
    its head unfrozen."""
    if tune == "lora":
        return add_lora(model, **(lora or {}), tokens=tokens)
    model = model.float()  # on a GPU it came in its own type, such as bf16, which rounds small steps away
    model.requires_grad_(tune == "full")
    model.get_output_embeddings().weight.requires_grad_(True)
    return model


def trained_facts(model: Any, tune: str, counts: Counts) -> dict[str, Any]:
    """Counted sizes of what is trained: ``n_lora`` is 0 where there are no adapters, and counts no rows of new tokens, which
    ``n_trained`` counts and ``counts`` too."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts: dict[str, Any] = {"tune": tune, "n_trained": trained, "n_lora": 0}
    if tune == "lora":
        n_lora = count_lora(model)
        facts |= {"n_lora": n_lora, "lora_rank": model.peft_config["default"].r, "lora_share": n_lora / counts.total}
    return facts


def tuning_flops(
    model: Any, tune: str, counts: Counts, tokens: float, logits: float, pairs: float, n_lora: int, new_tokens: bool = False
) -> float:
    """Forward and backward of one pass, see `gr.llm.backbone.train_flops`.

    ``new_tokens``: beside adapters rows of the head are trained, whose gradient is computed of all rows. The head alone: one
    forward pass, and the gradients of the head's weights and, where these are the input's too, the gradient
    that runs through the frozen blocks to it.
    """
    head = forward_flops(counts, 0, logits, 0)
    if tune == "lora":
        return train_flops(counts, tokens, logits, pairs, n_lora) + (head if new_tokens else 0)
    if tune == "full":
        return train_flops(counts, tokens, logits, pairs)
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        return forward_flops(counts, tokens, logits, pairs) + head
    return train_flops(counts, tokens, logits, pairs, 0) + head


def save_trained(
    model: Any,
    tokenizer: Any,
    tune: str,
    folder: Path,
    with_backbone: bool,
    with_tokenizer: bool = False,
    with_merged: bool = False,
) -> None:
    """Adapters as a PEFT folder, else the whole model with its tokenizer as a Hugging Face folder.

    Beside adapters, ``with_backbone``: what they stand on, in `backbone`: random weights are to be had nowhere else;
    ``with_tokenizer``: the tokenizer, which knows new tokens; ``with_merged``: the whole model that they make, in `merged`, as
    a folder for `AutoModelForCausalLM`, in fp32.
    """
    if tune != "lora":
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    save_adapter(model, folder)
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    if not (with_backbone or with_merged):
        return
    base = model.unload()
    if with_backbone:
        base.save_pretrained(folder / BACKBONE)
        tokenizer.save_pretrained(folder / BACKBONE)
    if with_merged:
        merged(base, folder).save_pretrained(folder / MERGED)
        tokenizer.save_pretrained(folder / MERGED)


def load_trained(backbone: str, folder: Path, tune: str, max_tokens: int) -> tuple[Any, Any]:
    """(model, tokenizer) of the finished training in ``folder``, adapters merged into their ``backbone``'s weights."""
    if tune != "lora":
        return load_backbone(folder, max_tokens)
    own = folder / BACKBONE
    model, tokenizer = load_backbone(own if own.is_dir() else backbone, max_tokens)
    if (folder / "tokenizer_config.json").is_file():  # it knows more tokens than the backbone's
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        grow(model, tokenizer)
    return merged(model, folder), tokenizer
