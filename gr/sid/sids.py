"""Semantic IDs: the codes of an item plus a digit that tells apart items with the same codes; as tokens of a recommender.

Token 0 is padding (and T5's decoder start); level l's code c is token 1 + offset[l] + c.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gr.errors import UserError


def disambiguate(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """(items, levels) codes -> (items, levels + 1): the last digit counts the items before it with the same codes."""
    _, group = np.unique(codes, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    sizes = np.bincount(group.ravel())
    digit = np.empty(len(codes), dtype=np.int64)
    digit[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.concatenate([codes, digit[:, None]], axis=1)


def sid_facts(codes: NDArray[np.int64], width: int) -> dict[str, object]:
    """What a tokenizer did, before the extra digit: share of items that share their codes with another item, the most items on
    one SID, and per level the share of codes in use and the entropy of their use in bits."""
    _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    use, entropy = [], []
    for level in codes.T:
        share = np.bincount(level, minlength=width) / len(level)
        use.append(float((share > 0).mean()))
        entropy.append(float(-(share[share > 0] * np.log2(share[share > 0])).sum()))
    return {
        "collision_rate": float((sizes[group.ravel()] > 1).mean()),
        "largest_collision": int(sizes.max()),
        "code_use": use,
        "code_entropy_bits": entropy,
    }


def write_sids(path: Path, codes: NDArray[np.int64]) -> None:
    """``codes``: (items, digits), every row different."""
    table = pa.table({"item": pa.array(range(len(codes)), pa.int32()), "codes": pa.array(codes.tolist(), pa.list_(pa.int32()))})
    pq.write_table(table, path)


@dataclass(frozen=True)
class SidTable:
    """``tokens``: (items, digits) int64 token numbers, each level in its own range; ``vocab``: how many, with padding."""

    tokens: NDArray[np.int64]
    vocab: int

    @classmethod
    def read(cls, path: Path) -> "SidTable":
        """From sids.parquet; UserError where two items have the same SID."""
        codes = np.array(pq.read_table(path)["codes"].to_pylist(), dtype=np.int64)
        if len(np.unique(codes, axis=0)) != len(codes):
            raise UserError(f"{path}: two items have the same SID; an extra digit must tell them apart")
        widths = codes.max(axis=0) + 1
        offsets = np.concatenate([[0], np.cumsum(widths)[:-1]])
        return cls(1 + offsets + codes, int(1 + widths.sum()))
