"""Ranking the catalogue's titles for users: the causal LM behind `gr.beam.beam_search`, with its prefix computed once per user.

All beams of a user share one row of the key-value cache: the prompt's slots, then one slot per beam and step. A beam's token
attends to the prompt and to its own ancestors' slots, told by a mask (tree attention, as in SpecInfer, arXiv 2305.09781). Beams
that branch or die change the mask's rows alone: the cache is never copied per beam nor reordered. Slots that no living
beam descends from are taken out when they have become a quarter.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from gr.beam import Beams, beam_search, length_groups
from gr.llm.backbone import Counts, count, forward_flops, logits_at
from gr.llm.titles import TitleTrie
from gr.terms import Length

SPARSE = 0.75
"""Where less than this share of the cache's users or slots is needed, dropping the others pays for copying what is left."""


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that doubles its room as it fills, where DynamicLayer copies all it holds at every step."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._room = [s.new_empty(*s.shape[:2], 0, s.shape[3]) for s in (key_states, value_states)]
        self._filled = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self._filled = self._filled, self._filled + key_states.shape[2]
        if self._filled > self._room[0].shape[2]:
            more = max(self._filled, 2 * before) - before
            self._room = [pad(r[:, :, :before], (0, 0, 0, more)) for r in self._room]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before : self._filled] = new
        self.keys, self.values = (room[:, :, : self._filled] for room in self._room)
        return self.keys, self.values

    def keep_rows(self, rows: Tensor) -> None:
        self._room = [room[rows] for room in self._room]
        self.keys, self.values = (room[:, :, : self._filled] for room in self._room)

    def keep_slots(self, slots: Tensor) -> None:
        """``slots``: (rows, kept) of each row."""
        heads, size = self._room[0].shape[1], self._room[0].shape[3]
        index = slots[:, None, :, None].expand(-1, heads, -1, size)
        self._room = [room.gather(2, index) for room in self._room]
        self._filled = slots.shape[1]
        self.keys, self.values = self._room


class TitleStepper:
    """A `gr.beam.Stepper` over a causal LM (scaled-dot-product or eager attention, no sliding window).

    ``prompts``: token numbers of each user's prompt, of any lengths; ``shift``: (users,) what is added to the numbers of
    generated tokens when they are read (`gr.sid.inputs`; None: nothing). Beams that have ended are not
    run on, and users all of whose beams have ended are dropped from the cache. ``flops`` counts what was run, padding left out.
    """

    def __init__(self, lm: Any, prompts: Sequence[NDArray[np.int64]], shift: NDArray[np.int64] | None = None) -> None:
        self.lm = lm
        self.counts: Counts = count(lm)
        self.flops, self.steps = 0.0, 0
        device = self.device = lm.get_input_embeddings().weight.device
        self.lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.shift = torch.zeros_like(self.lengths) if shift is None else torch.from_numpy(shift).to(device)
        width = int(self.lengths.max())
        # Padding stands on the right, where causal attention hides it from the prompt; the steps' mask hides it from the beams.
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        self.prompts = torch.from_numpy(ids).to(device)
        self.cache = Cache(layer_class_to_replicate=_GrowingLayer)
        self.live = torch.arange(len(prompts), device=device)  # users still in the cache
        # Per user and beam, its row in `seen`, if it was run last.
        self.place = torch.zeros(len(prompts), 1, dtype=torch.int64, device=device)

    def start(self, span: tuple[int, int]) -> Tensor:
        users, width = self.prompts.shape
        last = torch.arange(users, device=self.device) * width + self.lengths - 1
        logits = logits_at(self.lm, self.prompts, last, past_key_values=self.cache, use_cache=True)
        self.seen = (torch.arange(width, device=self.device) < self.lengths[:, None])[:, None, :]
        lengths = self.lengths.double()
        self.flops += forward_flops(self.counts, float(lengths.sum()), users, float((lengths * (lengths + 1) / 2).sum()))
        return _log_softmax(logits)[:, slice(*span)]

    def advance(self, beams: Beams, span: tuple[int, int]) -> Tensor:
        users, running = beams.users, beams.running
        if len(users) < SPARSE * len(self.live):
            self._keep(torch.isin(self.live, users).nonzero()[:, 0])
        at = torch.searchsorted(self.live, users)
        # The running beams of each user first, as many as the user with the most has; the rest of a row is filler.
        most = int(running.sum(dim=1).max())
        chosen = running.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        real = running.gather(1, chosen)
        rows = self.place[users].gather(1, beams.parents).gather(1, chosen).masked_fill_(~real, 0)
        run = (self._among_live(x, at) for x in (rows, beams.tokens.gather(1, chosen), real))
        logp = self._run(*run)[..., slice(*span)]
        logp = logp if len(at) == len(self.live) else logp[at]  # a copy, which may be large
        self.place = self.place.new_zeros(len(self.place), running.shape[1])
        self.place[users] = self.place[users].scatter(1, chosen, torch.arange(most, device=self.device).expand_as(chosen))
        if bool(real.all()) and real.shape == running.shape:
            return logp
        result = logp.new_empty(*running.shape, logp.shape[2])
        result[torch.arange(len(users), device=self.device)[:, None], chosen] = logp
        return result

    def _among_live(self, x: Tensor, at: Tensor) -> Tensor:
        """(users, rows) -> (live, rows), zero for those that are no longer ranked."""
        return x.new_zeros(len(self.live), x.shape[1]).index_copy_(0, at, x)

    def _run(self, parents: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        """One token per (live user, row): ``parents`` are rows of the run before; ``real`` marks what is no filler."""
        live, rows = tokens.shape
        own = torch.eye(rows, dtype=torch.bool, device=self.device).expand(live, rows, rows)
        ancestors = self.seen.gather(1, parents[..., None].expand(-1, -1, self.seen.shape[2]))
        self.seen = torch.cat([self._compacted(ancestors), own], dim=2)
        dtype = self.lm.get_input_embeddings().weight.dtype
        mask = torch.zeros(self.seen.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(~self.seen, torch.finfo(dtype).min)
        logits: Tensor = self.lm(
            input_ids=tokens + self.shift[:, None],
            attention_mask=mask[:, None],
            position_ids=(self.lengths + self.steps)[:, None].expand(-1, rows),
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.steps += 1
        self.flops += forward_flops(self.counts, int(real.sum()), int(real.sum()), float(self.seen[real].sum()))
        return _log_softmax(logits)

    def _compacted(self, seen: Tensor) -> Tensor:
        """``seen`` (live, rows, slots), of which the cache is left without slots that no row sees, where that pays."""
        used = seen.any(dim=1)
        kept = int(used.sum(dim=1).max())
        if kept >= SPARSE * used.shape[1]:
            return seen
        slots = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :kept]
        for layer in self.cache.layers:
            layer.keep_slots(slots)
        return seen.gather(2, slots[:, None, :].expand(-1, seen.shape[1], -1))

    def _keep(self, rows: Tensor) -> None:
        self.live, self.lengths, self.seen = self.live[rows], self.lengths[rows], self.seen[rows]
        self.shift = self.shift[rows]
        for layer in self.cache.layers:
            layer.keep_rows(rows)


def _log_softmax(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(dim=-1)


@torch.no_grad()
def rank_titles(
    lm: Any,
    trie: TitleTrie,
    prompts: Sequence[NDArray[np.int64]],
    beams: int,
    length: Length = "sum",
    shift: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """The (users, beams) best titles of each prompt by beam search, their scores, and the FLOPs; ``shift`` as in `TitleStepper`.

    A title's score is the ``length`` over its tokens, its end token included, of their log-probabilities, normalised as ``trie``
    says. The sum is the log-probability of the title, which no correction distorts; over the catalogue the mean also counts the
    tokens that are certain.
    """
    groups = length_groups(torch.tensor([len(p) for p in prompts], device=lm.get_input_embeddings().weight.device))
    found, flops = [], 0.0
    for rows in groups:
        own = None if shift is None else shift[rows.cpu().numpy()]
        stepper = TitleStepper(lm, [prompts[i] for i in rows.tolist()], own)
        lengths = trie.lengths if length == "mean" else None
        found.append(beam_search(stepper, trie.search, beams, trie.normalize == "catalogue", lengths))
        flops += stepper.flops
    back = torch.cat(groups).argsort()
    ranked, scores = (torch.cat(parts)[back].cpu().numpy() for parts in zip(*found, strict=True))
    return ranked, scores, flops
