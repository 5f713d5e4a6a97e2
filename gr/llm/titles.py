"""The catalogue as token sequences: one sequence per distinct title, and which items it stands for.

Several items may share a title, some have none, and a title cut to `MAX_TITLE_TOKENS` may become another's. All are counted.
Policies for shared titles:
- ``expand``: a generated title stands for all its items, the most bought in training first, then by item number: the ranking is
  one of items, as everywhere else;
- ``merge``: items that share a title are one: the ranking is one of titles, and the target is found with its title;
- ``disambiguate``: each gets a title of its own, in training and decoding: the shared one with those of its attributes behind it
  that not all of the others have, ``red lamp (Acme)``, or where these don't tell, a number, ``red lamp #2``.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gr.errors import UserError
from gr.llm.tokenizer import Frame, encode_titles
from gr.terms import Normalize, SharedTitles
from gr.trie import Trie

MAX_TITLE_TOKENS = 48  # without the end token
Ints = NDArray[np.int64]


def title_texts(items: pa.Table) -> tuple[list[str], int]:
    """Each item's title on one line, and how many had none.

    An item without a title gets ``untitled`` and its attributes, or without these ``item`` and its key.
    """
    texts, empty = [], 0
    for title, attributes, key in zip(*(items[c].to_pylist() for c in ("title", "attributes", "key")), strict=True):
        text = " ".join((title or "").split())
        if not text:
            empty += 1
            text = " ".join(["untitled", *attributes] if attributes else ["item", key])
        texts.append(" ".join(text.split()))
    return texts, empty


@dataclass(frozen=True)
class Titles:
    """The catalogue's titles as flat token arrays.

    ``tokens``: all titles' tokens, each title ended by the end token; title t is ``tokens[offsets[t]:offsets[t + 1]]``.
    ``of_item``: (items,) the title of each item; ``members``: (titles, most) the items of a title, most bought first, -1 beyond.
    """

    frame: Frame
    tokens: Ints
    offsets: Ints
    of_item: Ints
    members: Ints
    policy: SharedTitles
    counts: dict[str, int]

    @classmethod
    def build(
        cls,
        items: pa.Table,
        tokenizer: Any,
        frame: Frame,
        policy: SharedTitles = "expand",
        popularity: Ints | None = None,
        max_title_tokens: int = MAX_TITLE_TOKENS,
    ) -> "Titles":
        """``items``: the catalogue's table; ``popularity``: (items,) training interactions (None: all alike)."""
        texts, empty = title_texts(items)
        encoded = encode_titles(tokenizer, texts, frame.end)
        truncated = sum(len(e) > max_title_tokens for e in encoded)
        encoded = [ids[:max_title_tokens] for ids in encoded]
        sharing = np.array(list(Counter(ids.tobytes() for ids in encoded).values()))
        counts = {
            "shared_titles": int((sharing > 1).sum()),
            "items_with_shared_title": int(sharing[sharing > 1].sum()),
            "empty_titles": empty,
            "truncated_titles": truncated,
        }
        if policy == "disambiguate":
            encoded, counts["numbered_titles"] = _told_apart(
                encoded, items["attributes"].to_pylist(), tokenizer, frame.end, max_title_tokens
            )
        number: dict[bytes, int] = {}
        distinct: list[Ints] = []
        of_item = np.empty(len(texts), dtype=np.int64)
        for i, ids in enumerate(encoded):
            of_item[i] = number.setdefault(ids.tobytes(), len(distinct))
            if of_item[i] == len(distinct):
                distinct.append(np.append(ids, frame.end))
        counts["distinct_titles"] = len(distinct)
        members = _members(of_item, len(distinct), np.zeros(len(texts), np.int64) if popularity is None else popularity)
        offsets = np.concatenate([[0], np.cumsum([len(d) for d in distinct])])
        return cls(frame, np.concatenate(distinct), offsets, of_item, members, policy, counts)

    @property
    def lengths(self) -> Ints:
        """(titles,) tokens of each title, its end token included."""
        return np.diff(self.offsets)

    def lengths_of(self, titles: Ints) -> Ints:
        """`lengths` of some ``titles``, without those of all."""
        result: Ints = self.offsets[titles + 1] - self.offsets[titles]
        return result

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def sequences(self) -> list[list[int]]:
        """Every distinct title's tokens; none is the beginning of another, for each ends with the end token."""
        return [part.tolist() for part in np.split(self.tokens, self.offsets[1:-1])]

    def ranked_items(self, ranked: Ints, k: int) -> Ints:
        """(users, b) title numbers, best first and -1 where none, as (users, k) item numbers under the policy."""
        found = np.where((ranked >= 0)[..., None], self.members[ranked], -1)
        if self.policy == "merge":
            found = found[..., :1]
        flat = found.reshape(len(ranked), -1)
        order = np.argsort(flat < 0, axis=1, kind="stable")[:, :k]
        flat = np.take_along_axis(flat, order, axis=1)
        return np.pad(flat, ((0, 0), (0, k - flat.shape[1])), constant_values=-1)

    def stand_in(self, item: int) -> int:
        """The item that a hit on ``item`` is looked for as: itself, or under ``merge`` the first of its title."""
        return int(self.members[self.of_item[item], 0]) if self.policy == "merge" else item

    def check_fits(self, max_tokens: int) -> None:
        """UserError when the two longest titles don't fit one sequence: a target would be left without history."""
        need = len(self.frame.bos) + 2 * self.longest
        if max_tokens < need:
            raise UserError(f"config.max_tokens is {max_tokens}; a history and a target of the longest title take {need} tokens")


class TitleTrie:
    """The trie of a catalogue's titles, and where each title's tokens stand in it.

    ``node``: (tokens,) for each of `Titles.tokens` the node whose children it is chosen from; ``branches``: (tokens,) whether
    there are several. ``search``: the trie to decode over. Where probabilities are normalised over the "catalogue", a token
    without alternative is certain, so ``search`` ends each title with its last choice: the same ranking and scores in fewer
    steps. ``lengths``: (titles,) as in `Titles`.
    """

    def __init__(self, titles: Titles, normalize: Normalize) -> None:
        self.normalize = normalize
        self.lengths = torch.from_numpy(titles.lengths)
        sequences = titles.sequences()
        self.trie = self.search = Trie.build(sequences)
        self.node = self._nodes(titles)
        self.branches = np.diff(self.trie.first_edge.numpy())[self.node] > 1
        if normalize == "catalogue":
            last = np.maximum.reduceat(np.where(self.branches, np.arange(len(self.node)), 0), titles.offsets[:-1])
            kept = np.maximum(last + 1 - titles.offsets[:-1], 1)  # a catalogue of one title branches nowhere
            self.search = Trie.build([s[:k] for s, k in zip(sequences, kept, strict=True)])

    def to(self, device: str) -> "TitleTrie":
        """Moves what is searched; the per-token arrays stay with numpy."""
        self.search, self.lengths = self.search.to(device), self.lengths.to(device)
        return self

    def _nodes(self, titles: Titles) -> Ints:
        """Walks all titles down the trie at once; the edges are in order of (node, token), so one search finds a step's edges."""
        first, token, below = (t.numpy() for t in (self.trie.first_edge, self.trie.edge_token, self.trie.edge_node))
        base = int(token.max()) + 1
        edges = np.repeat(np.arange(len(first) - 1), np.diff(first)) * base + token
        nodes = np.zeros(len(titles.tokens), dtype=np.int64)
        for depth in range(1, titles.longest):
            at = titles.offsets[:-1][titles.lengths > depth] + depth
            nodes[at] = below[np.searchsorted(edges, nodes[at - 1] * base + titles.tokens[at - 1])]
        return nodes


def _told_apart(
    titles: list[Ints], attributes: Sequence[Sequence[str] | None], tokenizer: Any, end: int, most: int
) -> tuple[list[Ints], int]:
    """Each item's own tokens, of ``most`` at most, and how many items it took a number to tell apart.

    What stands behind a title is never cut for it, but for attributes of more than ``most`` / 2 tokens: rather the title is.
    """
    sharing: dict[bytes, list[int]] = {}
    for item, ids in enumerate(titles):
        sharing.setdefault(ids.tobytes(), []).append(item)
    used = {key for key, items in sharing.items() if len(items) == 1}
    result, numbered = list(titles), 0
    for items in (items for items in sharing.values() if len(items) > 1):
        common = set.intersection(*(set(attributes[i] or ()) for i in items))
        own = [", ".join(a for a in attributes[i] or () if a not in common) for i in items]
        behind = encode_titles(tokenizer, [f" ({text})" if text else "" for text in own], end)
        for item, suffix in zip(items, behind, strict=True):
            result[item] = _with(titles[item], suffix[: most // 2], most)
        alike = Counter(result[item].tobytes() for item in items)
        count = 0
        for item, text in zip(items, own, strict=True):
            ids = result[item]
            if not text or alike[ids.tobytes()] > 1 or ids.tobytes() in used:
                numbered += 1
                while ids is result[item] or ids.tobytes() in used:
                    count += 1
                    ids = _with(result[item], encode_titles(tokenizer, [f" #{count}"], end)[0], most)
                result[item] = ids
            used.add(ids.tobytes())
    return result, numbered


def _with(title: Ints, suffix: Ints, most: int) -> Ints:
    return np.concatenate([title[: max(0, most - len(suffix))], suffix])


def _members(of_item: Ints, titles: int, popularity: Ints) -> Ints:
    """(titles, most) items of each title by falling popularity, then by number; -1 beyond."""
    order = np.lexsort((np.arange(len(of_item)), -popularity, of_item))
    sizes = np.bincount(of_item, minlength=titles)
    place = np.arange(len(of_item)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    table = np.full((titles, int(sizes.max())), -1, dtype=np.int64)
    table[of_item[order], place] = order
    return table


def token_places(titles: Titles, numbers: Sequence[int] | Ints) -> Ints:
    """Where in `Titles.tokens` the tokens of several titles stand, one title after the other."""
    numbers = np.asarray(numbers)
    return ranges(titles.offsets[numbers], titles.lengths_of(numbers))


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """For each i, ``lengths[i]`` numbers from ``starts[i]`` on."""
    result: Ints = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
    return result
