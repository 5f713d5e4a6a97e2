"""From users' items to token batches: packed training sequences, prompts, and micro-batches without much padding.

A training sequence is ``<bos> title <end> title <end> ...`` over a run of a user's items, oldest first. One causal pass predicts
every title in it from those before it, so a run of n items is n - 1 training examples at the price of one. Sequences are padded
on the right, where causal attention keeps padding out of sight, so no mask is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gr.llm.titles import Titles, TitleTrie, token_places

Ints = NDArray[np.int64]
Items = NDArray[np.integer]
TOKENS_AT_ONCE = 4096  # padded tokens in one micro-batch: more gains nothing, and pads more
LOGITS_AT_ONCE = 2**26  # elements of (predicted tokens x vocabulary) in one micro-batch: a quarter GB in fp32


def windows(lengths: Ints, max_history: int, max_tokens: int) -> list[tuple[int, int]]:
    """Cuts a user's n titles of ``lengths`` tokens into runs [start, stop), from the newest back, never inside a title.

    A run has at most ``max_history`` + 1 titles and ``max_tokens`` tokens. It begins with the title that the run before it in
    time ends with: there a target, here history only. So every title but the user's first is a target once, with some history.
    """
    runs: list[tuple[int, int]] = []
    stop = len(lengths)
    while stop >= 2:
        newest_first = np.cumsum(lengths[max(0, stop - max_history - 1) : stop][::-1])
        fit = int(np.searchsorted(newest_first, max_tokens, side="right"))
        if fit < 2:
            raise ValueError(f"two titles of {newest_first[1]} tokens don't fit in {max_tokens}")
        runs.append((stop - fit, stop))
        if fit == stop:
            break
        stop = stop - fit + 1
    return runs


@dataclass(frozen=True)
class Packed:
    """One sequence: ``tokens``, the number of tokens at its beginning that are ``context`` and no target, and the ``places`` in
    `Titles.tokens` of the others."""

    tokens: Ints
    context: int
    places: Ints


def pack(titles: Titles, numbers: Ints, context_titles: int) -> Packed:
    """``<bos>`` and titles ``numbers``, of which the first ``context_titles`` are no targets."""
    bos = np.array(titles.frame.bos, dtype=np.int64)
    places = token_places(titles, numbers)
    context = int(titles.lengths[numbers[:context_titles]].sum())
    return Packed(np.concatenate([bos, titles.tokens[places]]), len(bos) + context, places[context:])


def training_sequences(titles: Titles, histories: Sequence[Items], max_history: int, max_tokens: int) -> list[Packed]:
    """The packed sequences of users' item runs; a user with fewer than two items has none."""
    packed = []
    for items in histories:
        numbers = titles.of_item[items]
        for start, stop in windows(titles.lengths[numbers], max_history, max_tokens - len(titles.frame.bos)):
            packed.append(pack(titles, numbers[start:stop], 1))
    return packed


def target_sequence(titles: Titles, history: Items, target: int, max_history: int, max_tokens: int) -> Packed:
    """The prompt of ``history`` and one target title."""
    prompt = prompts(titles, [history], max_history, max_tokens)[0]
    places = token_places(titles, titles.of_item[[target]])
    return Packed(np.concatenate([prompt, titles.tokens[places]]), len(prompt), places)


def prompts(titles: Titles, histories: Sequence[Items], max_history: int, max_tokens: int) -> list[Ints]:
    """``<bos>`` and the titles of each history's newest items, leaving room in ``max_tokens`` for the longest title to follow."""
    bos = np.array(titles.frame.bos, dtype=np.int64)
    room = max_tokens - len(bos) - titles.longest
    result = []
    for items in histories:
        numbers = titles.of_item[np.asarray(items)[-max_history:]]
        newest_first = np.cumsum(titles.lengths[numbers][::-1])
        fit = int(np.searchsorted(newest_first, room, side="right"))
        result.append(np.concatenate([bos, titles.tokens[token_places(titles, numbers[len(numbers) - fit :])]]))
    return result


@dataclass(frozen=True)
class Batch:
    """``input_ids``: (rows, length), padded right; ``positions``: (targets,) where each target token is predicted, into the
    flattened (rows * length); ``targets``: (targets,) those tokens; ``nodes``: (targets,) the trie's nodes they are chosen at.

    Under "catalogue" normalisation tokens without alternative are certain and left out of these. Counted, without padding:
    ``target_tokens``: target tokens, certain ones included; ``tokens`` run; ``pairs`` of a token and one that it attends to.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    nodes: Tensor
    target_tokens: int
    tokens: int
    pairs: int

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "positions": self.positions, "targets": self.targets, "nodes": self.nodes}


def batch(packed: Sequence[Packed], pad: int, trie: TitleTrie) -> Batch:
    """Pads sequences into one batch; the last token of a sequence is only predicted, not run."""
    sizes = np.array([len(p.tokens) - 1 for p in packed], dtype=np.int64)
    length = int(sizes.max())
    ids = np.full((len(packed), length), pad, dtype=np.int64)
    positions = []
    for row, p in enumerate(packed):
        ids[row, : sizes[row]] = p.tokens[:-1]
        positions.append(np.arange(row * length + p.context - 1, row * length + sizes[row]))
    at, targets = np.concatenate(positions), np.concatenate([p.tokens[p.context :] for p in packed])
    places = np.concatenate([p.places for p in packed])
    chosen = trie.branches[places] if trie.normalize == "catalogue" else np.ones(len(places), dtype=bool)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(at[chosen]),
        torch.from_numpy(targets[chosen]),
        torch.from_numpy(trie.node[places[chosen]]),
        len(places),
        int(sizes.sum()),
        int((sizes * (sizes + 1) // 2).sum()),
    )


def micro_batches(packed: Sequence[Packed], pad: int, trie: TitleTrie, vocab: int, accumulate: int = 1) -> list[Batch]:
    """Sequences of like length together, in batches of at most `TOKENS_AT_ONCE` padded tokens and `LOGITS_AT_ONCE` logits (both
    divided by ``accumulate``), or one sequence."""
    most = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocab) // accumulate
    groups: list[list[Packed]] = []
    for p in sorted(packed, key=lambda p: len(p.tokens), reverse=True):
        # The first of a group is its longest.
        if groups and len(groups[-1][0].tokens) * (len(groups[-1]) + 1) <= most:
            groups[-1].append(p)
        else:
            groups.append([p])
    return [batch(g, pad, trie) for g in groups]
