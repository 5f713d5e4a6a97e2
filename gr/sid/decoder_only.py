"""The decoder-only SID recommender: one causal pass over a user's SIDs predicts every item from those before it.

To a causal model a catalogue of SIDs is what a catalogue of titles is, token sequences none of which begins another. So
sequences, loss and decoding are those of LLM-as-RS (`gr.llm`); what differs is the vocabulary, and that there is nothing to
pretrain on.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from gr.errors import UserError
from gr.llm.backbone import fresh_backbone
from gr.llm.titles import Titles
from gr.llm.tokenizer import Frame
from gr.sid.sids import SidTable


def sid_titles(sids: SidTable) -> Titles:
    """The SIDs as `Titles`: SID s is title s, of as many tokens as it has digits; token 0 begins a sequence."""
    count, digits = sids.distinct.shape
    return Titles(
        frame=Frame(bos=(0,), end=0, pad=0),
        tokens=sids.distinct.reshape(-1),
        offsets=np.arange(count + 1) * digits,
        of_item=sids.of_item,
        members=sids.members,
        policy="expand",
        counts={},
    )


def most_tokens(sids: SidTable, max_history: int) -> int:
    """Tokens of the longest sequence: its beginning, a whole history, and a target."""
    return 1 + (max_history + 1) * int(sids.tokens.shape[1])


def decoder_only(vocab: int, layers: int, d_model: int, heads: int, d_kv: int, d_ff: int, dropout: float) -> Any:
    """A fresh causal transformer (`gr.llm.backbone.fresh_backbone`) of ``layers``, with ``dropout`` of the embeddings and of what
    each layer adds, as T5 has it. Seed torch before."""
    model = fresh_backbone(vocab, layers, d_model, heads, d_ff, head_dim=d_kv)
    if dropout:
        add_dropout(model, dropout)
    return model


def add_dropout(model: Any, share: float) -> None:
    """The architecture has none of its own but in attention's weights."""

    def dropped(module: nn.Module, _: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (nn.functional.dropout(out[0], share, module.training), *out[1:])
        result: Tensor = nn.functional.dropout(out, share, module.training)
        return result

    model.get_input_embeddings().register_forward_hook(dropped)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(dropped)
        layer.mlp.register_forward_hook(dropped)


def load_decoder_only(folder: Path) -> Any:
    """A trained recommender; UserError when it can't be loaded."""
    try:
        return Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: can't be loaded as a decoder-only SID recommender: {' '.join(str(error).split())}") from None
