"""A T5 recommender's weights as decoding reads them, and its encoder's pass over them.

Projections that read the same input are joined into one, the scale of each layer norm is folded into what reads it, and all stand
transposed, (in, out), as products of matrices read them fastest on a CPU. T5 knows no absolute positions, so what the first block
of a stack projects depends on the token alone: it is computed once per token of the vocabulary and looked up.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import T5ForConditionalGeneration

from gr.sid.t5 import Group, Layout, position_bias


class T5Weights:
    """Of ``model``, in eval mode; whose weights must not change after."""

    @torch.no_grad()
    def __init__(self, model: T5ForConditionalGeneration) -> None:
        self.model, self.config = model, model.config
        encoder: Any = model.encoder
        decoder: Any = model.decoder
        norm = decoder.final_layer_norm
        self.eps = norm.variance_epsilon
        self.encoder = [_Block(block) for block in encoder.block]
        self.decoder = [_DecoderBlock(block) for block in decoder.block]
        self.history = _Tokens(encoder.embed_tokens, self.encoder[0], self.eps)
        self.digits = _Tokens(decoder.embed_tokens, self.decoder[0], self.eps)
        across = [block.layer[1].EncDecAttention for block in decoder.block]
        self.cross = _transposed([w for a in across for w in (a.k.weight, a.v.weight)], encoder.final_layer_norm)
        scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0
        self.head = _transposed([model.lm_head.weight * scale], norm)
        # Distances are few: their biases are computed once, and again when a history is longer than any before.
        self.own_bias, self.encoder_bias = position_bias(decoder, 1), position_bias(encoder, 1)

    def biases(self, longest: int, digits: int) -> None:
        """Sees to it that there are the encoder's for ``longest`` tokens and the decoder's for ``digits``."""
        if self.encoder_bias.shape[-1] < longest:
            self.encoder_bias = position_bias(self.model.encoder, longest)
        if self.own_bias.shape[-1] < digits:
            self.own_bias = position_bias(self.model.decoder, digits)

    def norm(self, x: Tensor) -> Tensor:
        """(rows, d_model), without the scale, which stands in what reads it."""
        return _rms_norm(x, self.eps)

    def encode(self, numbers: Tensor, layout: Layout) -> Tensor:
        """(rows,) input tokens -> (rows, d_model) of the encoder, its last norm without its scale, as `cross` reads it."""
        heads = self.config.num_heads
        biases = [_biases(self.encoder_bias, g) for g in layout.groups]
        x, qkv = self.history(numbers)
        for i, block in enumerate(self.encoder):
            if i:
                qkv = self.norm(x) @ block.qkv
            x = torch.addmm(x, _attention(qkv, layout, biases, heads), block.own_out)
            x = block.feed_forward(x, self.norm(x))
        return self.norm(x)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    """On a CPU torch's own takes half as long again, for it writes down the squares that it sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return x * length.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


def _transposed(weights: list[Tensor], norm: Any = None) -> Tensor:
    """(out, in) weights -> (in, out) of all of them, that read the same input, scaled by ``norm`` if there is one."""
    joined = torch.cat(weights)
    return (joined if norm is None else joined * norm.weight).T.contiguous()


class _Block:
    def __init__(self, block: Any) -> None:
        own, dense = block.layer[0], block.layer[-1].DenseReluDense
        attention = own.SelfAttention
        self.qkv = _transposed([p.weight for p in (attention.q, attention.k, attention.v)], own.layer_norm)
        self.own_out = _transposed([attention.o.weight])
        self.wi, self.wo = _transposed([dense.wi.weight], block.layer[-1].layer_norm), _transposed([dense.wo.weight])

    def feed_forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """(rows, d_model), and what is made of ``normed`` added."""
        return torch.addmm(x, (normed @ self.wi).relu_(), self.wo)


class _DecoderBlock(_Block):
    def __init__(self, block: Any) -> None:
        super().__init__(block)
        across = block.layer[1]
        self.cross_q = _transposed([across.EncDecAttention.q.weight], across.layer_norm)
        self.cross_out = _transposed([across.EncDecAttention.o.weight])


class _Tokens:
    """Tokens' vectors, and the first block's queries, keys and values of them.

    ``looked_up``: FLOPs that a token is spared.
    """

    def __init__(self, tokens: nn.Embedding, block: _Block, eps: float) -> None:
        self.tokens, self.block, self.eps = tokens, block, eps
        self.table, self.looked_up = None, 0
        if type(tokens) is nn.Embedding:  # with tables for users and positions beside it, there are too many numbers
            self.table = torch.cat([tokens.weight, self._projected(tokens.weight)], dim=1)
            self.looked_up = 2 * block.qkv.numel()

    def __call__(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(rows,) -> (rows, d_model), (rows, 3 x heads x d_kv)"""
        if self.table is None:
            x: Tensor = self.tokens(numbers)
            return x, self._projected(x)
        x, qkv = embedding(numbers, self.table).tensor_split([self.tokens.embedding_dim], dim=1)
        return x, qkv

    def _projected(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.eps) @ self.block.qkv


def _biases(bias: Tensor, group: Group) -> Tensor:
    """(1, heads, n, n) of relative positions -> (users x heads, longest, longest) with what hides the group's padding."""
    own = bias[..., : group.longest, : group.longest]
    own = own if group.hidden is None else own + group.hidden
    return own.expand(len(group), -1, -1, -1).flatten(0, 1)


def _attention(qkv: Tensor, layout: Layout, biases: list[Tensor], heads: int) -> Tensor:
    """(rows, 3 x heads x d_kv) -> (rows, heads x d_kv), group by group; ``biases``: of each (users x heads, longest, longest)."""
    inner = qkv.shape[1] // 3
    out = qkv.new_empty(len(qkv), inner)
    sizes = [len(g) * g.longest for g in layout.groups]
    for group, own, bias, mixed in zip(layout.groups, qkv.split(sizes), biases, out.split(sizes), strict=True):
        users, n = len(group), group.longest
        # One copy per group, and products of what stands in one piece: matmul would copy each of the three.
        q, k, v = own.view(users, n, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, users * heads, n, -1)
        values = torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1), v)
        mixed.view(users, n, heads, -1).copy_(values.view(users, heads, n, -1).transpose(1, 2))
    return out
