"""A T5 recommender's weights as decoding reads them, and its encoder's pass over them.

Projections that read the same input are joined into one, the scale of each layer norm is folded into what reads it, and all stand
transposed, (in, out), as products of matrices read them fastest on a CPU. T5 knows no absolute positions, so what the encoder's
first block projects depends on the token alone; and what the decoder's first block does before it attends to a history, on the
digits alone. Both are computed once and looked up, the latter for every prefix of a SID that goes on.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import T5ForConditionalGeneration

from gr.llm.titles import TitleTrie
from gr.sid.t5 import Group, Layout, position_bias
from gr.trie import Trie

MOST_OF_PREFIXES = 2**23
"""Numbers of the table of prefixes, at most: for more the first block is run."""


class T5Weights:
    """Of ``model``, in eval mode, whose weights must not change after; to decode over ``trie``."""

    @torch.no_grad()
    def __init__(self, model: T5ForConditionalGeneration, trie: TitleTrie) -> None:
        self.model, self.config, self.trie = model, model.config, trie
        encoder: Any = model.encoder
        decoder: Any = model.decoder
        norm = decoder.final_layer_norm
        self.eps = norm.variance_epsilon * model.config.d_model
        self.encoder = [_Block(block) for block in encoder.block]
        self.decoder = [_DecoderBlock(block) for block in decoder.block]
        self.history = _Tokens(encoder.embed_tokens, self.encoder[0], self.eps)
        self.digits = _Tokens(decoder.embed_tokens, self.decoder[0], self.eps)
        across = [block.layer[1].EncDecAttention for block in decoder.block]
        self.cross = _transposed([w for a in across for w in (a.k.weight, a.v.weight)], encoder.final_layer_norm)
        scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0
        self.head = _transposed([model.lm_head.weight * scale], norm)
        # Distances are few: their biases are computed once, and again when a history is longer than any before.
        own_bias, self.encoder_bias = position_bias(decoder, trie.search.depth), position_bias(encoder, 1)
        self.own_biases = [own_bias[0, :, i, : i + 1].T[:, None] for i in range(trie.search.depth)]  # (digits, 1, heads)
        block = self.decoder[0]
        self.looked_up, self.prefixes = block.qkv.numel(), None
        if int((trie.search.leaf < 0).sum()) * (block.qkv.shape[0] + block.cross_q.shape[1]) <= MOST_OF_PREFIXES:
            self.prefixes = _Prefixes(self, trie.search)
            self.looked_up += block.own_out.numel() + block.cross_q.numel()

    def see_to(self, longest: int) -> None:
        """Biases for histories of ``longest`` tokens."""
        if self.encoder_bias.shape[-1] < longest:
            self.encoder_bias = position_bias(self.model.encoder, longest)

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

    def own(self, number: int, x: Tensor, qkv: Tensor, past: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A decoder block up to its attention to histories, of one more digit of each beam.

        ``x``: (beams, d_model), ``qkv``: (beams, 3 x heads x d_kv), ``past``: (digits before, beams then, 2, heads, d_kv) keys
        and values, of which the beams continue ``rows`` (beams,). Returns x, the queries (beams, heads x d_kv) of the attention
        to histories, and the beams' own ``past`` with this digit.
        """
        block, new = self.decoder[number], qkv.view(len(qkv), 3, self.config.num_heads, -1)
        past = _continued(past, rows, new[:, 1:])
        # A handful of digits: no product of matrices is worth starting.
        scores = (new[:, 0] * past[:, :, 0]).sum(-1) + self.own_biases[len(past) - 1]
        shares = scores.softmax(0)[..., None]
        mixed = shares[0] * past[0, :, 1]
        for share, before in zip(shares[1:], past[1:], strict=True):
            mixed.addcmul_(share, before[:, 1])
        x = torch.addmm(x, mixed.view(len(qkv), -1), block.own_out)
        return x, self.norm(x) @ block.cross_q, past


class _Prefixes:
    """Of each node of a trie that has children, what `T5Weights.own` of the first block makes of the digits down to it."""

    def __init__(self, weights: T5Weights, trie: Trie) -> None:
        device, c = trie.leaf.device, weights.config
        self.row, self.width = torch.zeros_like(trie.leaf), c.d_model
        nodes = torch.zeros(1, dtype=torch.int64, device=device)
        tokens = torch.full_like(nodes, c.decoder_start_token_id)
        past, rows = weights.cross.new_empty(0, 1, 2, c.num_heads, c.d_kv), nodes
        parts: list[Tensor] = []
        while len(nodes):
            self.row[nodes] = sum(map(len, parts)) + torch.arange(len(nodes), device=device)
            x, queries, past = weights.own(0, *weights.digits(tokens), past, rows)
            parts.append(torch.cat([x, queries], dim=1))
            parent, edge = _edges(trie, nodes)
            on = trie.leaf[trie.edge_node[edge]] < 0
            nodes, tokens, rows = trie.edge_node[edge[on]], trie.edge_token[edge[on]], parent[on]
        self.table = torch.cat(parts)

    def __call__(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """(beams,) -> (beams, d_model), (beams, heads x d_kv)"""
        x, queries = embedding(self.row[nodes], self.table).tensor_split([self.width], dim=1)
        return x, queries


def _edges(trie: Trie, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """All edges below ``nodes``, one after the other: (edges,) whose each is among the nodes, and its number.

    `Trie.children` gives all nodes as many as the widest has: of a whole level, which may have one very wide, too many.
    """
    first = trie.first_edge[nodes]
    counts = trie.first_edge[nodes + 1] - first
    parent = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return parent, torch.arange(len(parent), device=nodes.device) + (first - before)[parent]


def _continued(past: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """(digits, beams before, ...) -> (digits + 1, beams, ...): of each of ``rows``, and then ``new`` (beams, ...)."""
    digits, before = past.shape[:2]
    result = new.new_empty(digits + 1, *new.shape)
    result[digits] = new
    if digits:
        index = torch.arange(0, digits * before, before, device=rows.device)[:, None] + rows
        torch.index_select(past.flatten(0, 1), 0, index.flatten(), out=result[:digits].flatten(0, 1))
    return result


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(|x|^2 + eps): a layer norm but for its scale and sqrt(d_model), which stand in the weights that read it.

    On a CPU torch's own takes half as long again, for it writes down the squares that it sums.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return x * length.square_().add_(eps).rsqrt_().to(x.dtype)


def _transposed(weights: list[Tensor], norm: Any = None) -> Tensor:
    """(out, in) weights -> (in, out) of all of them, that read the same input, scaled by ``norm`` if there is one."""
    joined = torch.cat(weights)
    return (joined if norm is None else joined * (norm.weight * len(norm.weight) ** 0.5)).T.contiguous()


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
    """Tokens' vectors, and the first block's queries, keys and values of them; ``looked_up``: weights that a token is spared."""

    def __init__(self, tokens: nn.Embedding, block: _Block, eps: float) -> None:
        self.tokens, self.block, self.eps = tokens, block, eps
        self.table, self.looked_up = None, 0
        if type(tokens) is nn.Embedding:  # with tables for users and positions beside it, there are too many numbers
            self.table = torch.cat([tokens.weight, self._projected(tokens.weight)], dim=1)
            self.looked_up = block.qkv.numel()

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
    """(1, heads, n, n) of relative positions -> (users or 1, heads, longest, longest) with what hides the group's padding."""
    own = bias[..., : group.longest, : group.longest]
    return own if group.hidden is None else own + group.hidden


def _attention(qkv: Tensor, layout: Layout, biases: list[Tensor], heads: int) -> Tensor:
    """(rows, 3 x heads x d_kv) -> (rows, heads x d_kv), group by group; ``biases``: `_biases` of each."""
    inner = qkv.shape[1] // 3
    out = qkv.new_empty(len(qkv), inner)
    for group, own, bias, mixed in zip(
        layout.groups, qkv.split_with_sizes(layout.sizes), biases, out.split_with_sizes(layout.sizes), strict=True
    ):
        users, n = len(group), group.longest
        # One copy per group, and products of what stands in one piece: matmul would copy each of the three.
        q, k, v = own.view(users, n, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, users * heads, n, -1)
        scores = torch.bmm(q, k.transpose(1, 2))
        scores.view(users, heads, n, n).add_(bias)
        values = torch.bmm(scores.softmax(-1), v)
        mixed.view(users, n, heads, -1).copy_(values.view(users, heads, n, -1).transpose(1, 2))
    return out
