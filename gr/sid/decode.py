"""Decoding steps of a T5 recommender for `gr.beam`: the encoder once per user, its keys and values shared by all beams.

The decoder is run on the transformers model's own weights. Beams are query positions of one user, not rows of a batch, so
cross-attention reads each user's keys once, whatever the number of beams; only the few positions of a beam's own prefix are kept
per beam and reordered. What works token by token sees the beams that have not ended as rows of one matrix: where SIDs are told
apart by their first digits, most beams end before the last.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, relu, rms_norm
from transformers import T5ForConditionalGeneration

from gr.beam import beam_search
from gr.llm.titles import TitleTrie
from gr.sid.recommender import decoder_flops, encoder_flops
from gr.sid.t5 import Layout, encode, heads_of, position_bias, rows_of


class T5Weights:
    """A T5 model in eval mode, its projections that read the same input joined into one."""

    @torch.no_grad()
    def __init__(self, model: T5ForConditionalGeneration) -> None:
        self.model, self.config = model, model.config
        decoder: Any = model.decoder
        self.blocks = [_Block(block) for block in decoder.block]
        across = [block.layer[1].EncDecAttention for block in decoder.block]
        self.cross = torch.cat([w for a in across for w in (a.k.weight, a.v.weight)])
        # Distances are few: their biases are computed once, and again when a history is longer than any before.
        self.own_bias, self.encoder_bias = position_bias(decoder, 1), position_bias(model.encoder, 1)
        norm = decoder.final_layer_norm
        scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0
        self.head, self.eps = model.lm_head.weight * norm.weight * scale, norm.variance_epsilon

    def biases(self, longest: int, digits: int) -> None:
        """Sees to it that there are the encoder's for ``longest`` tokens and the decoder's for ``digits``."""
        if self.encoder_bias.shape[-1] < longest:
            self.encoder_bias = position_bias(self.model.encoder, longest)
        if self.own_bias.shape[-1] < digits:
            self.own_bias = position_bias(self.model.decoder, digits)


class _Block:
    """A decoder block's weights, each layer norm's scale folded into what reads it."""

    def __init__(self, block: Any) -> None:
        own, across, feed_forward = block.layer
        attention, dense = own.SelfAttention, feed_forward.DenseReluDense
        self.qkv = torch.cat([p.weight for p in (attention.q, attention.k, attention.v)]) * own.layer_norm.weight
        self.own_out, self.cross_out = attention.o.weight, across.EncDecAttention.o.weight
        self.cross_q = across.EncDecAttention.q.weight * across.layer_norm.weight
        self.wi, self.wo = dense.wi.weight * feed_forward.layer_norm.weight, dense.wo.weight


class T5Stepper:
    """`gr.beam.Stepper` for a T5 model and ``trie``; ``input_ids``, ``attention_mask``: (users, tokens), padded on the right.

    Users stand in ``layout.order``, not in that of their inputs. ``flops`` counts what was run, padding left out.
    """

    def __init__(self, weights: T5Weights, trie: TitleTrie, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.weights, self.trie, c = weights, trie, weights.config
        self.heads, self.d_kv = c.num_heads, c.d_kv
        self.users = len(input_ids)
        model: Any = weights.model
        self.layout = Layout.of(attention_mask, model.dtype)
        weights.biases(input_ids.shape[1], trie.search.depth)
        embedded = model.encoder.embed_tokens(input_ids.flatten()[self.layout.index])
        encoded = encode(model.encoder, embedded, self.layout, weights.encoder_bias)
        projected = linear(encoded, weights.cross).view(len(encoded), -1, self.heads * self.d_kv)
        # Per group and block the keys and then the values, in the order in which every step reads them.
        self.cross = [
            [heads_of(x[g.rows], len(g), self.heads).contiguous() for x in projected.unbind(1)] for g in self.layout.groups
        ]
        self.lengths = attention_mask.sum(dim=1)[self.layout.order]
        self.flops = encoder_flops(c, self.lengths.cpu().numpy())
        self.past: list[tuple[Tensor, Tensor]] = []  # per block (running beams, positions, heads, d_kv) keys and values
        self.row = torch.zeros(self.users, 1, dtype=torch.int64, device=input_ids.device)  # of each beam in `past`
        self.position = 0

    def start(self) -> Tensor:
        running = torch.ones(self.users, 1, dtype=torch.bool, device=self.row.device)
        tokens = torch.full((self.users, 1), self.weights.config.decoder_start_token_id, device=self.row.device)
        return self._step(tokens, running)[:, 0]

    def advance(self, parents: Tensor, tokens: Tensor, running: Tensor) -> Tensor:
        rows = self.row.gather(1, parents)[running]
        self.past = [(k[rows], v[rows]) for k, v in self.past]
        return self._step(tokens, running)

    def _step(self, tokens: Tensor, running: Tensor) -> Tensor:
        """(users, beams) last tokens -> (users, beams, vocab) of `gr.beam.Stepper`."""
        user, beam = running.nonzero(as_tuple=True)
        self.row = torch.zeros_like(tokens).masked_scatter_(running, torch.arange(len(user), device=user.device))
        # Among the queries of cross-attention a user's running beams stand first, in as many places as any user needs.
        each = running.sum(dim=1).cpu().numpy()
        most = int(each.max())
        groups = [n for n, g in enumerate(self.layout.groups) if each[g.users].any()]
        place = user * most + (running.cumsum(dim=1) - 1)[user, beam]
        x = self.weights.model.shared(tokens[running])
        bias = self.weights.own_bias[0, :, self.position, : self.position + 1].T[..., None]  # (positions so far, heads, 1)
        past: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self.weights.blocks):
            x = x + linear(self._self_attention(linear(self._norm(x), block.qkv), bias, i, past), block.own_out)
            x = x + linear(self._cross_attention(linear(self._norm(x), block.cross_q), i, groups, place, most), block.cross_out)
            x = x + linear(relu(linear(self._norm(x), block.wi), inplace=True), block.wo)
        self.past = past
        self.position += 1
        return self._predictions(self._norm(x), user, beam, running.shape)

    def _predictions(self, x: Tensor, user: Tensor, beam: Tensor, shape: Sequence[int]) -> Tensor:
        """(running beams, d_model), and whose each is among all of ``shape`` -> what `gr.beam.Stepper` returns."""
        head, normalized = self.weights.head, self.trie.normalize == "vocabulary"
        # A search that normalises over a digit's own tokens reads no others.
        first, end = (0, len(head)) if normalized else self.trie.search.span[self.position - 1]
        logits = linear(x, head[first:end])
        self._count(user, logits.numel())
        if normalized:
            logits = logits.float().log_softmax(-1)
        if normalized and len(user) == shape[0] * shape[1]:
            return logits.view(*shape, -1)
        result = logits.new_empty(*shape, len(head))
        result[..., first:end][user, beam] = logits
        return result

    def _count(self, user: Tensor, scores: int) -> None:
        pairs = len(user) * self.position + int(self.lengths[user].sum())
        self.flops += decoder_flops(self.weights.config, len(user), pairs, scores)

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], eps=self.weights.eps)

    def _self_attention(self, qkv: Tensor, bias: Tensor, block: int, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        q, k, v = qkv.view(len(qkv), 3, 1, self.heads, self.d_kv).unbind(1)
        if self.past:
            k, v = torch.cat([self.past[block][0], k], dim=1), torch.cat([self.past[block][1], v], dim=1)
        past.append((k, v))
        scores = (q * k).sum(-1, keepdim=True) + bias  # a handful of positions: no matrix product worth starting
        return (scores.softmax(1) * v).sum(1).view(len(qkv), -1)

    def _cross_attention(self, q: Tensor, block: int, groups: list[int], place: Tensor, beams: int) -> Tensor:
        """(running beams, heads x d_kv) queries, in ``place`` among (users x ``beams``), all of them of users in ``groups``."""
        whole = len(place) == self.users * beams
        queries = q if whole else q.new_zeros(self.users * beams, q.shape[1]).index_copy_(0, place, q)
        out = torch.empty_like(queries)
        for number in groups:
            group, (k, v) = self.layout.groups[number], self.cross[number][2 * block : 2 * block + 2]
            rows = slice(group.users.start * beams, group.users.stop * beams)
            scores = heads_of(queries[rows], len(group), self.heads) @ k.transpose(2, 3)
            out[rows] = rows_of((scores if group.hidden is None else scores + group.hidden).softmax(-1) @ v)
        return out if whole else out[place]


@torch.inference_mode()
def rank_sids(
    weights: T5Weights, trie: TitleTrie, inputs: dict[str, Tensor], beams: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """The (users, beams) best SIDs of each history by beam search, -1 where there are fewer, their log-probabilities, normalised
    as ``trie`` says, and the FLOPs. ``inputs``: of `gr.sid.recommender.SidBatcher.encoder_inputs`."""
    stepper = T5Stepper(weights, trie, **inputs)
    found, scores = beam_search(stepper, trie.search, beams, trie.normalize == "catalogue")
    back = stepper.layout.order.argsort()
    return found[back].cpu().numpy(), scores[back].cpu().numpy(), stepper.flops
