"""Semantic IDs: the codes of an item, as a rule with a digit that tells apart items with the same codes; as tokens of a
recommender.

Token 0 is padding (and T5's decoder start); level l's code c is token 1 + offset[l] + c.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gr.errors import UserError

Ints = NDArray[np.int64]


def disambiguate(codes: Ints) -> Ints:
    """(items, levels) codes -> (items, levels + 1): the last digit counts the items before it with the same codes."""
    _, group = np.unique(codes, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    sizes = np.bincount(group.ravel())
    digit = np.empty(len(codes), dtype=np.int64)
    digit[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.concatenate([codes, digit[:, None]], axis=1)


def collision_rate(codes: Ints) -> float:
    """Share of the items that share their codes (items, levels) with another item."""
    _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return float((sizes[group.ravel()] > 1).mean())


def sid_facts(codes: Ints, width: int) -> dict[str, object]:
    """What a tokenizer did, before the extra digit: share of items that share their codes with another item, the most items on
    one SID; the bits of an item's identity that the codes keep, and the bits that there are; and per level the share of codes in
    use and the entropy of their use in bits.

    Bits kept: the mutual information of the item, drawn uniformly from the catalogue, and its codes. As the codes are a function
    of the item, that is the entropy of the codes; log2(items) would be all of it.
    """
    sizes = np.unique(codes, axis=0, return_counts=True)[1]
    use, entropy = [], []
    for level in codes.T:
        count = np.bincount(level, minlength=width)
        use.append(float((count > 0).mean()))
        entropy.append(_entropy(count))
    return {
        "collision_rate": collision_rate(codes),
        "largest_collision": int(sizes.max()),
        "identity_bits": _entropy(sizes),
        "identity_bits_of": float(np.log2(len(codes))),
        "code_use": use,
        "code_entropy_bits": entropy,
    }


def _entropy(count: Ints) -> float:
    share = count[count > 0] / count.sum()
    return float(-(share * np.log2(share)).sum())


def write_sids(path: Path, codes: Ints, levels: int | None = None, shared: bool = False) -> None:
    """``codes``: (items, digits); ``levels``: how many of the digits are codes (None: all but the last, which is an extra digit);
    ``shared``: several items may have one SID."""
    table = pa.table({"item": pa.array(range(len(codes)), pa.int32()), "codes": pa.array(codes.tolist(), pa.list_(pa.int32()))})
    kept = {"levels": str(codes.shape[1] - 1 if levels is None else levels), "shared": str(shared).lower()}
    pq.write_table(table.replace_schema_metadata(kept), path)


@dataclass(frozen=True)
class SidTable:
    """``tokens``: (items, digits) int64 token numbers, each level in its own range; ``vocab``: how many, with padding.

    ``levels``: how many of the digits are codes (None: all but the last, an extra digit). Several items may have one SID: SIDs
    are numbered in the order of their first items, so that without any such SID i is item i. ``popularity``: (items,) training
    interactions, by which the items of one SID are ranked, most first and then by item number (None: by number alone).
    """

    tokens: Ints
    vocab: int
    levels: int | None = None
    popularity: Ints | None = None

    @classmethod
    def read(cls, path: Path) -> "SidTable":
        """From sids.parquet; UserError where two items have the same SID and its writer did not allow it."""
        table = pq.read_table(path)
        codes = np.array(table["codes"].to_pylist(), dtype=np.int64)
        said = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if said.get("shared") != "true" and len(np.unique(codes, axis=0)) != len(codes):
            raise UserError(f"{path}: two items have the same SID; an extra digit must tell them apart")
        widths = codes.max(axis=0) + 1
        offsets = np.concatenate([[0], np.cumsum(widths)[:-1]])
        levels = int(said["levels"]) if "levels" in said else None
        return cls(1 + offsets + codes, int(1 + widths.sum()), levels)

    @cached_property
    def of_item(self) -> Ints:
        """(items,) the number of each item's SID."""
        return _numbered(self.tokens)

    @cached_property
    def distinct(self) -> Ints:
        """(sids, digits) the tokens of each SID."""
        return self.tokens[np.unique(self.of_item, return_index=True)[1]]

    @cached_property
    def members(self) -> Ints:
        """(sids, most) the items of each SID in their ranking, -1 beyond."""
        popularity = np.zeros(len(self.tokens), np.int64) if self.popularity is None else self.popularity
        order = np.lexsort((np.arange(len(self.tokens)), -popularity, self.of_item))
        sizes = np.bincount(self.of_item)
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        table = np.full((len(sizes), int(sizes.max())), -1, dtype=np.int64)
        table[self.of_item[order], place] = order
        return table

    @property
    def shared(self) -> bool:
        """Whether several items have one SID."""
        return len(self.distinct) < len(self.tokens)

    def tie_facts(self) -> dict[str, int]:
        """How many SIDs several items have, how many items these are, and of how many the place among them is by number alone."""
        tied = np.bincount(self.of_item)[self.of_item] > 1
        popularity = np.zeros(len(self.tokens), np.int64) if self.popularity is None else self.popularity
        alike = _numbered(np.stack([self.of_item, popularity], axis=1))
        return {
            "shared_sids": int((self.members[:, 1:] >= 0).any(axis=1).sum()),
            "items_with_shared_sid": int(tied.sum()),
            "items_ranked_by_number": int((np.bincount(alike)[alike] > 1).sum()),
        }

    def ranked_items(self, ranked: NDArray[np.integer], k: int) -> NDArray[np.int32]:
        """(users, b) SID numbers, best first and -1 where none, as (users, k) items, each SID's in their order."""
        flat = np.where((ranked >= 0)[..., None], self.members[ranked], -1).reshape(len(ranked), -1)
        order = np.argsort(flat < 0, axis=1, kind="stable")[:, :k]
        flat = np.take_along_axis(flat, order, axis=1)
        return np.pad(flat, ((0, 0), (0, k - flat.shape[1])), constant_values=-1).astype(np.int32)

    def code_ranks(self, ranked: NDArray[np.integer], targets: Ints) -> NDArray[np.int32]:
        """1-based rank of each target item's codes, without the extra digit, among the different codes of ``ranked`` (users, b)
        SID numbers; 0 where they are not there. It is never worse than the item's own rank."""
        levels = self.tokens.shape[1] - 1 if self.levels is None else self.levels
        group = _numbered(self.distinct[:, :levels])
        found = np.where(ranked >= 0, group[ranked], -1)
        order = np.argsort(found, axis=1, kind="stable")  # equal codes side by side, the best first
        ordered = np.take_along_axis(found, order, axis=1)
        first = np.empty(found.shape, dtype=bool)
        np.put_along_axis(first, order, np.diff(ordered, axis=1, prepend=-1) != 0, axis=1)
        hit = first & (found == group[self.of_item[targets]][:, None])
        rank = np.cumsum(first, axis=1)[np.arange(len(found)), hit.argmax(axis=1)]
        return np.where(hit.any(axis=1), rank, 0).astype(np.int32)


def _numbered(rows: Ints) -> Ints:
    """(n, columns) -> (n,) a number for each different row, in the order of their first appearance."""
    _, first, group = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return np.asarray(number[group.ravel()])
