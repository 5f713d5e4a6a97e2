"""From users' items to token batches: packed training sequences, prompts, and micro-batches without much padding.

A training sequence is ``<bos> title <end> title <end> ...`` over a run of a user's items, oldest first. One causal pass predicts
every title in it from those before it, so a run of n items is n - 1 training examples at the price of one. Sequences are padded
on the right, where causal attention keeps padding out of sight, so no mask is needed.

A history may show more of an item than is generated of it (`gr.llm.shown`): ``<bos> title (brand) <end> title (brand) <end>``.
What is shown begins with the title, so one pass still serves: after the last token of a title the loss is that of its end,
whatever stands there in the sequence, and the rest of what is shown is history to the titles after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gr.errors import UserError
from gr.llm.titles import Titles, TitleTrie, ranges, token_places

Ints = NDArray[np.int64]
Items = NDArray[np.integer]


@dataclass(frozen=True)
class AtOnce:
    """The most of one micro-batch: padded ``tokens``, and elements of ``logits``, (predicted tokens x vocabulary)."""

    tokens: int
    logits: int

    def most(self, vocab: int) -> int:
        """Padded tokens of one micro-batch of a model of ``vocab`` tokens, each of which may be predicted from."""
        return min(self.tokens, self.logits // vocab)


ON_CPU = AtOnce(2**12, 2**26)  # more gains nothing, and pads more
ON_GPU = AtOnce(2**15, 2**29)  # fewer leave the device waiting for its kernels to be started; the logits are 2 GB in fp32


def at_once(device: torch.device) -> AtOnce:
    return ON_CPU if device.type == "cpu" else ON_GPU


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
    """One sequence: the ``tokens`` that are run, and for each target token the place ``at`` in them that predicts it, the token
    itself and its place in `Titles.tokens`."""

    tokens: Ints
    at: Ints
    targets: Ints
    places: Ints

    @property
    def context(self) -> int:
        """Tokens before the first target."""
        return int(self.at[0]) + 1


def pack(titles: Titles, numbers: Ints, context_titles: int) -> Packed:
    """``<bos>`` and titles ``numbers``, of which the first ``context_titles`` are no targets."""
    return _packed(titles, numbers, titles, numbers, np.array([len(numbers)]), context_titles)[0]


def _packed(titles: Titles, numbers: Ints, shown: Titles, forms: Ints, sizes: Ints, context: int) -> list[Packed]:
    """Runs of ``sizes`` (runs,) items, one behind the other, whose titles are ``numbers`` and which ``shown`` has as ``forms``;
    the first ``context`` items of a run are no targets. All at once, for a batch has many and short ones."""
    bos = np.array(titles.frame.bos, dtype=np.int64)
    lengths = shown.lengths_of(forms)
    run = np.repeat(np.arange(len(sizes)), sizes)  # of each item
    first = np.cumsum(sizes) - sizes  # item of each run
    before = np.cumsum(lengths) - lengths  # tokens of the items before, whatever their run
    begins = before[first] + np.arange(len(sizes)) * len(bos)  # each run's tokens
    starts = before + (run + 1) * len(bos)  # each item's tokens
    tokens = np.empty(lengths.sum() + len(sizes) * len(bos), dtype=np.int64)
    tokens[begins[:, None] + np.arange(len(bos))] = bos
    tokens[ranges(starts, lengths)] = shown.tokens[token_places(shown, forms)]
    targets = np.flatnonzero(np.arange(len(run)) - first[run] >= context)
    many = titles.lengths_of(numbers[targets])
    places = token_places(titles, numbers[targets])
    at = ranges((starts - begins[run])[targets] - 1, many)
    ends = np.cumsum(np.bincount(run[targets], many, len(sizes)).astype(np.int64)).tolist()
    each = zip(begins.tolist(), [0, *ends], ends, strict=False)
    predicted = titles.tokens[places]
    return [Packed(tokens[begin : begin + at[b - 1] + 1], at[a:b], predicted[a:b], places[a:b]) for begin, a, b in each]


def training_sequences(
    titles: Titles, histories: Sequence[Items], max_history: int, max_tokens: int, shown: Titles | None = None
) -> list[Packed]:
    """The packed sequences of users' item runs; a user with fewer than two items has none. ``shown``: how items appear in a
    history (None: by their titles)."""
    shown, room = shown or titles, max_tokens - len(titles.frame.bos)
    sizes = np.array([len(items) for items in histories], dtype=np.int64)
    items = np.concatenate([*histories, np.empty(0, np.int64)]).astype(np.int64)
    numbers, forms = titles.of_item[items], shown.of_item[items]
    lengths, ends = shown.lengths_of(forms), np.cumsum(sizes)
    sums = np.append(0, np.cumsum(lengths))
    long = (sizes > max_history + 1) | (sums[ends] - sums[ends - sizes] > room)
    runs: list[tuple[int, int]] = []
    for start, end, cut in zip((ends - sizes).tolist(), ends.tolist(), long.tolist(), strict=True):
        own = windows(lengths[start:end], max_history, room) if cut else [(0, end - start)] if end - start > 1 else []
        runs += [(start + first, start + stop) for first, stop in own]
    begins, stops = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    places = ranges(begins, stops - begins)
    return _packed(titles, numbers[places], shown, forms[places], stops - begins, 1)


def target_sequence(
    titles: Titles, history: Items, target: int, max_history: int, max_tokens: int, shown: Titles | None = None
) -> Packed:
    """The prompt of ``history`` and one target title."""
    prompt = prompts(titles, [history], max_history, max_tokens, shown)[0]
    places = token_places(titles, titles.of_item[[target]])
    tokens = titles.tokens[places]
    return Packed(np.concatenate([prompt, tokens[:-1]]), len(prompt) - 1 + np.arange(len(places)), tokens, places)


def prompts(
    titles: Titles, histories: Sequence[Items], max_history: int, max_tokens: int, shown: Titles | None = None
) -> list[Ints]:
    """``<bos>`` and each history's newest items, leaving room in ``max_tokens`` for the longest title to follow."""
    shown = shown or titles
    bos = np.array(titles.frame.bos, dtype=np.int64)
    room = max_tokens - len(bos) - titles.longest
    result = []
    for items in histories:
        forms = shown.of_item[np.asarray(items)[-max_history:]]
        newest_first = np.cumsum(shown.lengths_of(forms)[::-1])
        fit = int(np.searchsorted(newest_first, room, side="right"))
        result.append(np.concatenate([bos, shown.tokens[token_places(shown, forms[len(forms) - fit :])]]))
    return result


def check_fits(titles: Titles, shown: Titles, max_tokens: int) -> None:
    """UserError when two of the longest items don't fit one sequence: a target would be left without history."""
    need = len(titles.frame.bos) + 2 * shown.longest
    if max_tokens < need:
        raise UserError(f"config.max_tokens is {max_tokens}; a history and a target of the longest item take {need} tokens")


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
    """Pads sequences into one batch."""
    sizes = np.array([len(p.tokens) for p in packed], dtype=np.int64)
    length = int(sizes.max())
    ids = np.full((len(packed), length), pad, dtype=np.int64)
    positions = []
    for row, p in enumerate(packed):
        ids[row, : sizes[row]] = p.tokens
        positions.append(row * length + p.at)
    at, targets = np.concatenate(positions), np.concatenate([p.targets for p in packed])
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


def micro_batches(
    packed: Sequence[Packed], pad: int, trie: TitleTrie, vocab: int, accumulate: int = 1, limit: AtOnce = ON_CPU
) -> list[Batch]:
    """Sequences of like length together, in batches of at most ``limit`` (divided by ``accumulate``), or one sequence."""
    most = limit.most(vocab) // accumulate
    groups: list[list[Packed]] = []
    for p in sorted(packed, key=lambda p: len(p.tokens), reverse=True):
        # The first of a group is its longest; the token that it predicts last counts too.
        if groups and (len(groups[-1][0].tokens) + 1) * (len(groups[-1]) + 1) <= most:
            groups[-1].append(p)
        else:
            groups.append([p])
    return [batch(g, pad, trie) for g in groups]
