"""A prefix tree of token sequences as flat integer tensors, so that constrained decoding needs no Python per beam or user."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """Node 0 is the root; the children of node n are edges ``first_edge[n] .. first_edge[n+1]``, sorted by token.

    ``first_edge``: (nodes+1,) int64; ``edge_token``, ``edge_node``: (edges,) int64; ``leaf``: (nodes,) int64, the number of the
    sequence that ends there, or -1. ``span[d]``: the least token that a node at depth d is continued by, and one more than
    the greatest; ``widest[d]``: the most children that one has; ``counted[d]``: whether those of each are the first tokens of the
    span, as those of a digit are that tells items of one SID apart.
    """

    first_edge: Tensor
    edge_token: Tensor
    edge_node: Tensor
    leaf: Tensor
    span: tuple[tuple[int, int], ...]
    widest: tuple[int, ...]
    counted: tuple[bool, ...]

    @property
    def depth(self) -> int:
        """Tokens in the longest sequence."""
        return len(self.span)

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> "Trie":
        """Sequence i's end node has leaf i. Sequences must be distinct, non-empty, and none the beginning of another."""
        order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
        parent, token, leaf = [-1], [-1], [-1]
        spans: list[tuple[int, int]] = []
        widest: list[int] = []
        counted: list[bool] = []
        path: list[int] = []  # nodes from the root's child down to the last sequence's end
        previous: tuple[int, ...] = ()
        for i in order:
            sequence = tuple(sequences[i])
            shared = next((d for d, (a, b) in enumerate(zip(previous, sequence, strict=False)) if a != b), None)
            if shared is None:
                if not sequence or previous:
                    raise ValueError(f"sequence {i} {sequence} repeats or continues {previous}")
                shared = 0
            del path[shared:]
            for t in sequence[shared:]:
                parent.append(path[-1] if path else 0)
                token.append(t)
                leaf.append(-1)
                path.append(len(parent) - 1)
            leaf[path[-1]] = i
            previous = sequence
        parents = np.array(parent[1:], dtype=np.int64)
        # Nodes were made in depth-first order with siblings by rising token, so a stable sort by parent keeps that order.
        by_parent = np.argsort(parents, kind="stable")
        first = np.concatenate([[0], np.cumsum(np.bincount(parents, minlength=len(parent)))])
        level = np.zeros(1, dtype=np.int64)
        edge_node = by_parent + 1
        tokens = np.array(token[1:], dtype=np.int64)[by_parent]
        while True:
            counts = first[level + 1] - first[level]
            if counts.sum() == 0:
                break
            edges = np.concatenate([np.arange(first[n], first[n + 1]) for n in level])
            spans.append((int(tokens[edges].min()), int(tokens[edges].max()) + 1))
            widest.append(int(counts.max()))
            within = np.concatenate([np.arange(n) for n in counts])
            counted.append(bool((tokens[edges] - spans[-1][0] == within).all()))
            level = edge_node[edges]
        return cls(
            torch.from_numpy(first.astype(np.int64)),
            torch.from_numpy(tokens),
            torch.from_numpy(edge_node.astype(np.int64)),
            torch.tensor(leaf, dtype=torch.int64),
            tuple(spans),
            tuple(widest),
            tuple(counted),
        )

    def children(self, node: Tensor, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Below nodes (...), as (..., n) tokens, child nodes, and whether there is one; n is the most of any of them, or 1, if
        ``most`` does not say it, which spares a GPU the wait for that number."""
        first, end = self.first_edge[node], self.first_edge[node + 1]
        most = max(1, int((end - first).max())) if most is None else most
        edge = first[..., None] + torch.arange(most, device=node.device)
        exists = edge < end[..., None]
        edge.clamp_(max=len(self.edge_token) - 1)
        return self.edge_token[edge], self.edge_node[edge], exists

    def to(self, device: torch.device | str) -> "Trie":
        first, token, node, leaf = (t.to(device) for t in (self.first_edge, self.edge_token, self.edge_node, self.leaf))
        return Trie(first, token, node, leaf, self.span, self.widest, self.counted)
