"""T5's forward pass on transformers' own weights, arranged so that little of it is padding.

Most histories are short, so a batch padded to its longest is mostly padding. Here users of like length stand together: what
works token by token (embeddings, projections, feed-forward) sees the tokens of all groups as rows of one matrix; only attention
goes group by group, each padded to its own longest. transformers' T5 gives the same logits, at half the speed or less.
"""

import itertools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import relu, rms_norm, scaled_dot_product_attention
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5LayerNorm

from gr.dropout import dropout

LEAST_IN_GROUP = 4  # users; fewer at once leave the processor idle, whatever padding they save
GROUPS = 16


@dataclass(frozen=True)
class Group:
    """``users``: their places among the sorted users; ``rows``: those of their tokens, ``longest`` each, among all rows;
    ``hidden``: (users, 1, 1, longest) 0 at tokens and the least finite number at padding, or None where there is none."""

    users: slice
    rows: slice
    longest: int
    hidden: Tensor | None

    def __len__(self) -> int:
        return int(self.users.stop - self.users.start)


@dataclass(frozen=True)
class Layout:
    """``order``: (users,) sorted by length; ``index``: (rows,) the place of each row in the flattened (users x tokens) batch."""

    groups: tuple[Group, ...]
    order: Tensor
    index: Tensor

    @property
    def sizes(self) -> list[int]:
        """Rows of each group."""
        return [len(g) * g.longest for g in self.groups]

    @classmethod
    def of(cls, attention_mask: Tensor, dtype: torch.dtype) -> "Layout":
        """``attention_mask``: (users, tokens), 0 at padding, which stands on the right."""
        if attention_mask.device.type != "cpu":
            return cls._whole(attention_mask, dtype)
        users, width = attention_mask.shape
        counts = attention_mask.sum(dim=1).clamp(min=1).numpy()
        order = np.argsort(counts, kind="stable")
        lengths = counts[order]
        index, groups, row = [], [], 0
        for start, end in itertools.pairwise(_cuts(lengths, max(LEAST_IN_GROUP, users // GROUPS))):
            longest, some = int(lengths[end - 1]), order[start:end]
            index.append((some[:, None] * width + np.arange(longest)).ravel())
            hidden = None
            if lengths[start] < longest:
                padding = np.arange(longest) >= lengths[start:end, None]
                hidden = torch.zeros(len(some), 1, 1, longest, dtype=dtype)
                hidden.masked_fill_(torch.from_numpy(padding)[:, None, None], torch.finfo(dtype).min)
            groups.append(Group(slice(start, end), slice(row, row + len(some) * longest), longest, hidden))
            row += len(some) * longest
        return cls(tuple(groups), torch.from_numpy(order), torch.from_numpy(np.concatenate(index)))

    @classmethod
    def _whole(cls, attention_mask: Tensor, dtype: torch.dtype) -> "Layout":
        """One group of all users, in their order: starting a group's kernels takes a GPU longer than its padding does, and it
        need not tell the lengths."""
        users, width = attention_mask.shape
        padding = attention_mask == 0
        padding[:, 0] = False  # an empty history is one of padding
        hidden = torch.zeros(users, 1, 1, width, dtype=dtype, device=attention_mask.device)
        hidden = hidden.masked_fill(padding[:, None, None], torch.finfo(dtype).min)
        order, index = (torch.arange(n, device=attention_mask.device) for n in (users, users * width))
        return cls((Group(slice(0, users), slice(0, users * width), width, hidden),), order, index)


def _cuts(lengths: NDArray[np.int64], least: int) -> list[int]:
    """Where to cut rising ``lengths``: between different ones, at least ``least`` from the cut before and from the end."""
    cuts = [0]
    for place in (np.flatnonzero(np.diff(lengths)) + 1).tolist():
        if place - cuts[-1] >= least and len(lengths) - place >= least:
            cuts.append(place)
    return [*cuts, len(lengths)]


def heads_of(x: Tensor, users: int, heads: int) -> Tensor:
    """(users x n, heads x d_kv) rows -> (users, heads, n, d_kv)."""
    return x.view(users, -1, heads, x.shape[-1] // heads).transpose(1, 2)


def rows_of(x: Tensor) -> Tensor:
    """(users, heads, n, d_kv) -> (users x n, heads x d_kv)."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], -1)


def encode(encoder: Any, embedded: Tensor, layout: Layout) -> Tensor:
    """(rows, d_model) embedded tokens -> (rows, d_model) of T5's ``encoder``."""
    share, training, heads = encoder.config.dropout_rate, encoder.training, encoder.config.num_heads
    bias = position_bias(encoder, max(g.longest for g in layout.groups))
    biases = [_biased(bias[..., : g.longest, : g.longest], g.hidden) for g in layout.groups]
    sizes = layout.sizes
    x = dropout(embedded, share, training)
    for block in encoder.block:
        own, feed_forward = block.layer[0], block.layer[1]
        attention = own.SelfAttention
        normed = own.layer_norm(x)
        q, k, v = attention.q(normed), attention.k(normed), attention.v(normed)
        parts = []
        for group, b, *rows in zip(layout.groups, biases, *(y.split_with_sizes(sizes) for y in (q, k, v)), strict=True):
            gq, gk, gv = (heads_of(y, len(group), heads) for y in rows)
            parts.append(rows_of(_attend(gq, gk, gv, b, share, training)))
        x = x + dropout(attention.o(torch.cat(parts)), share, training)
        x = x + dropout(_feed_forward(feed_forward, x, share, training), share, training)
    return dropout(encoder.final_layer_norm(x), share, training)


def _biased(scores: Tensor, bias: Tensor | None) -> Tensor:
    return scores if bias is None else scores + bias


def position_bias(stack: Any, longest: int) -> Tensor:
    """(1, heads, longest, longest): what T5 adds to scores by the distance of query and key; the first block holds it for all."""
    bias: Tensor = stack.block[0].layer[0].SelfAttention.compute_bias(longest, longest)
    return bias


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, share: float, training: bool) -> Tensor:
    if q.device.type != "cpu":  # in one kernel; on a CPU that takes longer for sequences this short
        return scaled_dot_product_attention(q, k, v, bias, dropout_p=share if training else 0.0, scale=1.0)
    return dropout(_biased(q @ k.transpose(2, 3), bias).softmax(dim=-1), share, training) @ v


def _feed_forward(layer: Any, x: Tensor, share: float, training: bool) -> Tensor:
    dense = layer.DenseReluDense
    out: Tensor = dense.wo(dropout(relu(dense.wi(layer.layer_norm(x)), inplace=True), share, training))
    return out


def decode(decoder: Any, embedded: Tensor, encoded: Tensor, layout: Layout) -> Tensor:
    """(users, n, d_model) embedded tokens, in ``layout.order`` -> (users x n, d_model) of T5's ``decoder``."""
    users, n, width = embedded.shape
    share, training, heads = decoder.config.dropout_rate, decoder.training, decoder.config.num_heads
    causal = torch.full((n, n), torch.finfo(embedded.dtype).min, dtype=embedded.dtype, device=embedded.device).triu(1)
    bias = position_bias(decoder, n) + causal
    sizes, targets = layout.sizes, [len(g) * n for g in layout.groups]
    x = dropout(embedded.reshape(users * n, width), share, training)
    for block in decoder.block:
        own, across, feed_forward = block.layer
        attention = own.SelfAttention
        normed = own.layer_norm(x)
        q, k, v = (heads_of(p(normed), users, heads) for p in (attention.q, attention.k, attention.v))
        x = x + dropout(attention.o(rows_of(_attend(q, k, v, bias, share, training))), share, training)
        attention = across.EncDecAttention
        q, k, v = attention.q(across.layer_norm(x)), attention.k(encoded), attention.v(encoded)
        parts = []
        own_rows = (y.split_with_sizes(of) for y, of in ((q, targets), (k, sizes), (v, sizes)))
        for group, *rows in zip(layout.groups, *own_rows, strict=True):
            gq, gk, gv = (heads_of(y, len(group), heads) for y in rows)
            parts.append(rows_of(_attend(gq, gk, gv, group.hidden, share, training)))
        x = x + dropout(attention.o(torch.cat(parts)), share, training)
        x = x + dropout(_feed_forward(feed_forward, x, share, training), share, training)
    return dropout(decoder.final_layer_norm(x), share, training)


def _norm(self: Any, x: Tensor) -> Tensor:
    """T5LayerNorm's forward pass, on a GPU in one kernel for six."""
    if x.device.type == "cpu":
        normed: Tensor = T5LayerNorm.forward(self, x)
        return normed
    return rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class GroupedT5(nn.Module):
    """``t5``, with a forward pass in groups of like length; what is saved and loaded is ``t5`` itself."""

    def __init__(self, t5: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.t5 = t5
        for module in t5.modules():
            if isinstance(module, T5LayerNorm):
                module.forward = MethodType(_norm, module)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Seq2SeqLMOutput:
        """(users, tokens), (users, tokens) padded on the right, (users, digits) -> (users, digits, vocab) logits."""
        model: Any = self.t5
        layout = Layout.of(attention_mask, model.dtype)
        encoded = encode(model.encoder, model.encoder.embed_tokens(input_ids.flatten()[layout.index]), layout)
        x = decode(model.decoder, model.shared(decoder_input_ids[layout.order]), encoded, layout)
        if model.config.scale_decoder_outputs:
            x = x * model.config.d_model**-0.5
        logits = model.lm_head(x).view(*decoder_input_ids.shape, -1)
        return Seq2SeqLMOutput(logits=logits[layout.order.argsort()])
