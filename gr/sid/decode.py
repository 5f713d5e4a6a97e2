"""Decoding steps of a T5 recommender for `gr.beam`: the encoder once per user, its keys and values shared by all beams.

Beams are query positions of one user, not rows of a batch, so cross-attention reads each user's keys once, whatever the number
of beams; only the few positions of a beam's own prefix are kept per beam and reordered. What works token by token sees the beams
that have not ended as rows of one matrix: where SIDs are told apart by their first digits, many beams end before the last.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gr.beam import Beams, beam_search
from gr.sid.recommender import decoder_flops, encoder_flops
from gr.sid.t5 import Layout
from gr.sid.t5_weights import T5Weights

Attend = Callable[[Tensor, int], Tensor]
"""(running beams, heads x d_kv) queries and a block's number -> (running beams, heads x d_kv)."""


class T5Stepper:
    """`gr.beam.Stepper` for a T5 model; ``input_ids``, ``attention_mask``: (users, tokens), padded on the right.

    Users stand in ``layout.order``, not in that of their inputs. ``flops`` counts what was run, padding left out.
    """

    def __init__(self, weights: T5Weights, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.weights, c = weights, weights.config
        self.layout = Layout.of(attention_mask, weights.cross.dtype)
        weights.see_to(input_ids.shape[1])
        encoded = weights.encode(input_ids.flatten()[self.layout.index], self.layout)
        self.lengths = attention_mask.sum(dim=1)[self.layout.order]
        blocks = len(weights.decoder)
        self.across = _CrossAttention(encoded @ weights.cross, self.layout, self.lengths, blocks, c.num_heads)
        tokens = self.lengths.cpu().numpy()
        self.flops = encoder_flops(c, tokens) - 2.0 * weights.history.looked_up * float(tokens.sum())
        # Per block, keys and values of the running beams: (digits, running beams, 2, heads, d_kv). None are needed of prefixes.
        self.past = [encoded.new_empty(0, len(input_ids), 2, c.num_heads, c.d_kv)] * blocks
        self.row = torch.zeros(len(input_ids), 1, dtype=torch.int64, device=input_ids.device)  # of each beam in `past`
        self.position = 0

    def start(self, span: tuple[int, int]) -> Tensor:
        root = torch.zeros_like(self.row)
        tokens = torch.full_like(root, self.weights.config.decoder_start_token_id)
        users = torch.arange(len(root), device=root.device)
        return self.advance(Beams(users, root, tokens, root, torch.ones_like(root, dtype=torch.bool)), span)[:, 0]

    def advance(self, beams: Beams, span: tuple[int, int]) -> Tensor:
        weights, running = self.weights, beams.running.flatten()
        places = running.nonzero()[:, 0]  # index_select reads at them several times as fast as brackets do by a mask
        rows = self.row[beams.users].gather(1, beams.parents).flatten().index_select(0, places)
        user = beams.users.index_select(0, places // beams.running.shape[1])
        attend = self.across.of(user)
        if weights.prefixes:
            x, q = weights.prefixes(beams.nodes.flatten().index_select(0, places))
        else:
            x, q = self._own(0, *weights.digits(beams.tokens.flatten().index_select(0, places)), rows)
        for i, block in enumerate(weights.decoder):
            if i:
                x, q = self._own(i, x, weights.norm(x) @ block.qkv, rows)
            x = torch.addmm(x, attend(q, i), block.cross_out)
            x = block.feed_forward(x, weights.norm(x))
        self.position += 1
        numbers = running.cumsum(0).sub_(1).view_as(beams.running)  # of beams that don't run any will do
        self.row = numbers.new_zeros(len(self.row), numbers.shape[1]).index_copy_(0, beams.users, numbers)
        logp = self._predictions(weights.norm(x), user, span)
        if len(places) < len(running):
            logp = logp.new_empty(len(running), logp.shape[1]).index_copy_(0, places, logp)
        return logp.view(*beams.running.shape, -1)

    def _own(self, block: int, x: Tensor, qkv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`T5Weights.own` of beams that continue ``rows`` of the step before."""
        x, q, self.past[block] = self.weights.own(block, x, qkv, self.past[block], rows)
        return x, q

    def _predictions(self, x: Tensor, user: Tensor, span: tuple[int, int]) -> Tensor:
        """(running beams, d_model) and whose each is -> (running beams, end - first)."""
        weights, normalized = self.weights, self.weights.trie.normalize == "vocabulary"
        # A search that normalises over a digit's own tokens reads no others.
        logits = x @ (weights.head if normalized else weights.head[:, slice(*span)])
        own = len(user) * self.position
        pairs = own + int(self.lengths.index_select(0, user).sum())
        self.flops += decoder_flops(weights.config, len(user), pairs, logits.numel()) - 2.0 * weights.looked_up * len(user)
        if weights.prefixes:
            self.flops -= 4.0 * weights.config.num_heads * weights.config.d_kv * own
        return logits.float().log_softmax(-1)[:, slice(*span)] if normalized else logits


class _CrossAttention:
    """Of running beams to the histories of their users.

    ``projected``: (rows of ``layout``, blocks x 2 x heads x d_kv), each block's keys and then its values; ``lengths``: (users,).
    """

    def __init__(self, projected: Tensor, layout: Layout, lengths: Tensor, blocks: int, heads: int) -> None:
        self.lengths, self.heads = lengths, heads
        rows = projected.view(len(projected), 2 * blocks, heads, -1)
        self.sizes = [len(g) * heads for g in layout.groups]
        self.hidden = [None if g.hidden is None else g.hidden.expand(-1, heads, -1, -1).flatten(0, 1) for g in layout.groups]
        # Per group, in the order in which products of matrices read them.
        each = [rows[g.rows].view(len(g), g.longest, *rows.shape[1:]) for g in layout.groups]
        keys = [x[:, :, 0::2].permute(2, 0, 3, 4, 1).flatten(1, 2).contiguous() for x in each]
        values = [x[:, :, 1::2].permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous() for x in each]
        self.keys = [[x[block] for x in keys] for block in range(blocks)]
        self.values = [[x[block] for x in values] for block in range(blocks)]

    def of(self, user: Tensor) -> Attend:
        """``user``: (running beams,) whose each is, in rising order.

        A user's running beams stand first among its queries, of which all users have as many as any needs.
        """
        users = len(self.lengths)
        each = user.bincount(minlength=users)
        most = int(each.max())
        whole = len(user) == users * most
        if not whole:
            shift = torch.arange(0, users * most, most, device=user.device) - (each.cumsum(0) - each)
            place = shift.index_select(0, user).add_(torch.arange(len(user), device=user.device))

        def attend(q: Tensor, block: int) -> Tensor:
            q = q if whole else q.new_zeros(users * most, q.shape[1]).index_copy_(0, place, q)
            queries = q.view(users, most, self.heads, -1).transpose(1, 2).flatten(0, 1).contiguous()
            mixed = torch.empty_like(queries)
            parts = queries.split_with_sizes(self.sizes), mixed.split_with_sizes(self.sizes)
            for own, out, keys, values, hidden in zip(*parts, self.keys[block], self.values[block], self.hidden, strict=True):
                scores = torch.bmm(own, keys) if hidden is None else torch.baddbmm(hidden, own, keys)
                torch.bmm(scores.softmax(-1), values, out=out)
            rows = mixed.view(users, self.heads, most, -1).transpose(1, 2).reshape(users * most, -1)
            return rows if whole else rows.index_select(0, place)

        return attend


@torch.inference_mode()
def rank_sids(weights: T5Weights, inputs: dict[str, Tensor], beams: int) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """The (users, beams) best SIDs of each history by beam search, -1 where there are fewer, their log-probabilities, normalised
    as the trie of ``weights`` says, and the FLOPs. ``inputs``: of `gr.sid.recommender.SidBatcher.encoder_inputs`."""
    stepper, trie = T5Stepper(weights, **inputs), weights.trie
    found, scores = beam_search(stepper, trie.search, beams, trie.normalize == "catalogue")
    back = stepper.layout.order.argsort()
    return found[back].cpu().numpy(), scores[back].cpu().numpy(), stepper.flops
