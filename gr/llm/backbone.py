"""The backbone: a fresh Qwen3-architecture model of any size, or any causal LM of the Hugging Face hub or a local folder."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import is_flash_attn_2_available

from gr.count import embedding_tables
from gr.errors import UserError
from gr.trie import Trie


def fresh_backbone(
    vocab: int,
    layers: int,
    d_model: int,
    heads: int,
    d_ff: int,
    kv_heads: int | None = None,
    max_tokens: int = 4096,
    head_dim: int | None = None,
) -> Any:
    """A randomly initialised Qwen3 (arXiv 2505.09388): pre-norm, SwiGLU, rotary positions, QK-norm; embeddings tied.

    Unlike in the released sizes, ``head_dim`` is d_model / heads if not given, and the initialisation's standard deviation is
    1/sqrt(d_model) up to .05: Qwen's .02 is made for widths above a thousand. Seed torch before.
    """
    if head_dim is not None and head_dim % 2:
        raise UserError(f"size: heads of {head_dim}; rotary positions need an even number")
    if (head_dim is None and (d_model % heads or (d_model // heads) % 2)) or heads % (kv_heads or heads):
        raise UserError(
            f"size: d_model {d_model}, heads {heads}, kv_heads {kv_heads}: d_model / heads must be a whole even number"
            " and heads a multiple of kv_heads"
        )
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=d_model,
            intermediate_size=d_ff,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            head_dim=head_dim or d_model // heads,
            max_position_embeddings=max_tokens,
            initializer_range=min(0.05, d_model**-0.5),
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            attn_implementation="sdpa",
        )
    )


def load_backbone(name_or_path: str | Path, max_tokens: int, in_4bit: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a hub name or local folder, without any code of theirs; fp32 on CPU, their own type on a GPU.

    ``in_4bit``: its linear layers rounded to 4 bits (`_in_4bit`). UserError when it can't be loaded, is no causal LM, lacks
    weights that would then be random, or its context is shorter than ``max_tokens``.
    """
    name = f"model {str(name_or_path)!r}"
    quantized = _in_4bit() if in_4bit else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            trust_remote_code=False,
            use_safetensors=True,  # a .bin is a pickle
            attn_implementation="sdpa",
            dtype="auto" if torch.cuda.is_available() else torch.float32,
            output_loading_info=True,
            **quantized,
        )
    except (OSError, ValueError, SafetensorError) as error:
        safe = "; weights are read from safetensors only" if "safetensors" in str(error) else ""
        raise UserError(f"{name} can't be loaded as a causal LM: {' '.join(str(error).split())}{safe}") from None
    if lacking := sorted(info["missing_keys"]):
        raise UserError(f"{name} is no whole causal LM: {len(lacking)} weights are missing, such as {lacking[0]}")
    context = min((n for n in _limits(model.config.get_text_config()) if n), default=max_tokens)
    if max_tokens > context:
        raise UserError(f"config.max_tokens is {max_tokens}; {str(name_or_path)!r} attends to at most {context} tokens")
    if not is_causal(model):
        raise UserError(f"{name} is no causal LM: what it predicts depends on the tokens that follow")
    return model, tokenizer


def _in_4bit() -> dict[str, Any]:
    """How transformers loads a model in 4-bit NormalFloat (QLoRA, arXiv 2305.14314), computing in bf16, by bitsandbytes.

    UserError where there is no CUDA device or no bitsandbytes.
    """
    if not torch.cuda.is_available():
        raise UserError("config.load_in_4bit needs a CUDA device, and this machine has none; leave it out")
    if find_spec("bitsandbytes") is None:
        raise UserError("config.load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": how, "device_map": {"": torch.cuda.current_device()}}


def attend_by(model: Any, attention: str, precision: str) -> None:
    """Has ``model`` compute attention by transformers' implementation ``attention``; UserError where that can't be done here."""
    if attention == "flash_attention_2":
        if not torch.cuda.is_available() or not is_flash_attn_2_available():
            lacking = "a CUDA device, and this machine has none" if not torch.cuda.is_available() else "the package flash-attn"
            raise UserError(f"config.attention: flash_attention_2 needs {lacking}; sdpa needs nothing")
        if precision != "bf16":
            raise UserError(f"config.attention: flash_attention_2 computes in bf16; launch.precision is {precision}")
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"config.attention: {attention} with a model of type {model.config.model_type!r}: {words}") from None


def checkpoint_activations(model: Any) -> None:
    """Has ``model`` keep only each block's input for the backward pass, and compute the rest again there (Chen et al. 2016, arXiv
    1604.06174). UserError for a model that transformers can't do it with."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"config.checkpoint_activations: {' '.join(str(error).split())}") from None


def _limits(text: Any) -> list[int | None]:
    """How many tokens a model has positions for, and how many its layers see; None for no limit."""
    limits = [getattr(text, "max_position_embeddings", None)]
    kinds = getattr(text, "layer_types", None) or ["unknown"]
    if getattr(text, "use_sliding_window", True) is not False and set(kinds) != {"full_attention"}:
        limits.append(getattr(text, "sliding_window", None))  # decoding makes its own mask, which knows no window
    return limits


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """Whether the prediction at a token is the same whatever follows it; tried with two sequences, by a model in eval mode.

    A mask makes it exactly so; what is allowed is the rounding of models whose batches fall out differently, as with experts.
    """
    embeddings = model.get_input_embeddings().weight
    first, one, other = (len(embeddings) * k // 4 for k in (1, 2, 3))
    tokens = torch.tensor([[first, one], [first, other]], device=embeddings.device)
    a, b = (model(input_ids=row[None], use_cache=False).logits[0].float() for row in tokens)
    changed = (a - b).abs().amax(dim=1)
    return bool(changed[0] <= max(1e-4, 8 * torch.finfo(embeddings.dtype).eps) * changed[1])


@dataclass(frozen=True)
class Counts:
    """Counted parameters, without adapters: ``total``, those outside the input and output embeddings (``blocks``), and those that
    a predicted token's logits cost (``head``, vocabulary x width, tied or not). ``width``: layers x heads x head_dim."""

    total: int
    blocks: int
    head: int
    width: int


def count(model: Any) -> Counts:
    """Counts a causal LM's parameters; the frozen weights under LoRA count, the adapters don't."""
    own = {id(p): p for name, p in model.named_parameters() if "lora_" not in name}
    head = model.get_output_embeddings().weight
    embeddings = {id(p): p.numel() for p in (*embedding_tables(model.get_input_embeddings()), head)}
    # Two weights of 4 bits are one element; bitsandbytes knows the shape that they had.
    total = sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in own.values())
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Counts(total, total - sum(embeddings.values()), head.numel(), text.num_hidden_layers * heads * head_dim)


def forward_flops(counts: Counts, tokens: float, logits: float, pairs: float) -> float:
    """Multiply-adds counted as two: 2 N_blocks per token, 2 V d per token whose logits are computed, and 4 x layers x heads x
    head_dim per pair of query and key (scores, and weighted values)."""
    return 2 * counts.blocks * tokens + 2 * counts.head * logits + 4 * counts.width * pairs


def train_flops(counts: Counts, tokens: float, logits: float, pairs: float, n_lora: int | None = None) -> float:
    """Forward and backward of one pass. All weights trained: 3 x forward (6 N per token).

    With LoRA the frozen weights need the gradient of their input, not their own: 2 x forward (4 N per token) for blocks and head;
    attention has no weights and costs 3 x as before; the adapters' own weights cost 6 ``n_lora`` per token.
    """
    if n_lora is None:
        return 3 * forward_flops(counts, tokens, logits, pairs)
    frozen = 2 * forward_flops(counts, tokens, logits, 0)
    return frozen + 3 * forward_flops(counts, 0, 0, pairs) + 6 * n_lora * tokens


def logits_at(model: Any, input_ids: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
    """Logits of some positions only: (n, vocab) for n ``positions`` into the flattened (rows * length) of ``input_ids``.

    The selection is made on the way into the output layer, so whatever an architecture does to its logits after it still is done.
    """
    head: nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[positions],))
    try:
        logits: Tensor = model(input_ids=input_ids, **kwargs).logits
    finally:
        hook.remove()
    return logits


class NextTitle(nn.Module):
    """The language-model loss on target tokens only; one forward call, so that it can be wrapped for several processes.

    ``trie``: given, a token's probabilities sum to one over those that continue its prefix to a title of the catalogue, and the
    product over a title's tokens is a distribution over the titles; not given, over the whole vocabulary, as usual.
    """

    def __init__(self, lm: Any, trie: Trie | None = None) -> None:
        super().__init__()
        self.lm, self.trie = lm, trie

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor, nodes: Tensor) -> Tensor:
        """Summed negative log-likelihood (nats) of the target tokens; in fp64, for how a batch is cut must not show; shapes in
        `gr.llm.sequences.Batch`."""
        return self.token_nll(input_ids, positions, targets, nodes).double().sum()

    def token_nll(self, input_ids: Tensor, positions: Tensor, targets: Tensor, nodes: Tensor) -> Tensor:
        """(targets,) negative log-likelihood of each target token, in fp32 or wider."""
        logits = logits_at(self.lm, input_ids, positions, use_cache=False)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if self.trie is None:
            return nn.functional.cross_entropy(wide, targets, reduction="none")
        if self.trie.first_edge.device != nodes.device:
            self.trie = self.trie.to(nodes.device)
        return _log_normalizer(wide, self.trie, nodes) - wide.gather(1, targets[:, None])[:, 0]


def _log_normalizer(logits: Tensor, trie: Trie, nodes: Tensor) -> Tensor:
    """(n,) log of the summed exponentials of the logits (n, vocab) that lead to children of ``nodes`` (n,).

    Ragged, because the root has many hundred children and most nodes a few.
    """
    first = trie.first_edge[nodes]
    sizes = trie.first_edge[nodes + 1] - first
    row = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), sizes)
    edge = torch.arange(len(row), device=nodes.device) + torch.repeat_interleave(first - (sizes.cumsum(0) - sizes), sizes)
    allowed = logits[row, trie.edge_token[edge]]
    largest = torch.full_like(logits[:, 0], float("-inf")).scatter_reduce(0, row, allowed.detach(), "amax")
    summed = torch.zeros_like(largest).index_add(0, row, (allowed - largest[row]).exp())
    return summed.log() + largest
