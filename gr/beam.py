"""Beam search constrained to a trie: deterministic, batched over users, no Python per beam or user.

Scores are sums of the model's own log-probabilities over its whole vocabulary, or, with ``normalize``, over the tokens that the
trie allows (for a model that was trained so). A sequence that has ended keeps its place with its score, and as a score only
falls when a sequence grows, an unfinished beam never overtakes unjustly. With as many beams as sequences the result is the exact
ranking of all of them.

Ranked by the mean per token instead, a beam that is not at its end counts with the tokens that it has. Its mean may rise yet, so
that a narrow search may lose a title by it; with as many beams as sequences it is exact all the same.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gr.trie import Trie

LENGTH_GROUPS = 4
ROWS_IN_GROUP = 8  # fewer at once leave the processor idle, whatever padding they save


def length_groups(lengths: Tensor) -> tuple[Tensor, ...]:
    """Row numbers (rows,) in groups of like ``lengths``, for what runs once per row before the search.

    Most histories are short: padded to the longest of a batch, more than half of the work is padding. A GPU, whose time for a
    batch this small is that of starting its kernels, gets all rows at once.
    """
    groups = min(LENGTH_GROUPS, len(lengths) // ROWS_IN_GROUP) if lengths.device.type == "cpu" else 1
    return lengths.argsort(stable=True).tensor_split(max(1, groups))


@dataclass(frozen=True)
class Beams:
    """What a search goes on with.

    ``users``: (users,) their rising numbers; those that are left out have been ranked, and don't come back. The rest is
    (users, beams): ``parents``, which beam of the step before each continues, the ``tokens`` that it is continued by, the trie's
    ``nodes`` where it stands then, and whether it is ``running``: others have ended, or are none.
    """

    users: Tensor
    parents: Tensor
    tokens: Tensor
    nodes: Tensor
    running: Tensor


class Stepper(Protocol):
    """A model that predicts the next token of several continuations (beams) per user."""

    def start(self, span: tuple[int, int]) -> Tensor:
        """(users, end - first) log-probabilities that a sequence begins with each of the tokens ``span`` = (first, end)."""
        ...

    def advance(self, beams: Beams, span: tuple[int, int]) -> Tensor:
        """(users, beams, end - first) log-probabilities of each of the tokens ``span`` to come next.

        Where the search normalizes them, any numbers will do that differ from them by one constant per beam. What is returned
        for beams that are not running is not read.
        """
        ...


@torch.no_grad()
def beam_search(
    stepper: Stepper, trie: Trie, beams: int, normalize: bool = False, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the (users, beams) best sequences' numbers and scores, best first; -1 and -inf where there are fewer.

    ``normalize``: probabilities over the allowed tokens rather than the vocabulary. ``lengths``: (sequences,) tokens by whose
    number a sequence's log-probability is divided; not given, it is the score itself.
    Equal scores are ordered by the beams before them, then by token, so the result does not depend on the batch.
    """
    logp = stepper.start(trie.span[0])[:, None, :]
    users = torch.arange(len(logp), device=logp.device)  # those whose search goes on
    found = torch.full((len(logp), beams), -1, device=logp.device)
    scores = torch.full((len(logp), beams), float("-inf"), dtype=logp.dtype, device=logp.device)
    node = torch.zeros(len(logp), 1, dtype=torch.int64, device=logp.device)
    score = torch.zeros(len(logp), 1, dtype=logp.dtype, device=logp.device)
    for depth in range(trie.depth):
        parents, tokens, node, score, key = _extend(trie, depth, node, score, logp, beams, normalize, lengths)
        leaf = trie.leaf[node].masked_fill_(score.isinf(), -1)
        running = (leaf < 0) & ~score.isinf()
        going = running.any(dim=1)
        on = going.nonzero()[:, 0]
        if len(on) < len(users):
            over = (~going).nonzero()[:, 0]
            found[users[over], : leaf.shape[1]] = leaf[over]
            scores[users[over], : leaf.shape[1]] = key[over]
            if not len(on):
                break
            users, parents, tokens = users[on], parents[on], tokens[on]
            node, score, running = node[on], score[on], running[on]
        logp = stepper.advance(Beams(users, parents, tokens, node, running), trie.span[depth + 1])
    return found, scores


def _extend(
    trie: Trie,
    depth: int,
    node: Tensor,
    score: Tensor,
    logp: Tensor,
    beams: int,
    normalize: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One level down: the best ``beams`` of all children of the present nodes and of the sequences that have ended.

    ``node``, ``score``: (users, b); ``logp``: (users, b, tokens of the depth's span). Returns (users, b') parents, tokens, nodes,
    log-probabilities and what ranks them.
    """
    users, kept = node.shape
    at = node.flatten()
    first = trie.first_edge.index_select(0, at)
    counts = (trie.first_edge.index_select(0, at + 1) - first).view_as(node)
    ended = counts == 0
    # The place of a beam that there is not stands at any node, with any prediction.
    counts.masked_fill_(score.isinf(), 0)
    most = max(1, int(counts.max()))
    slots = torch.arange(most, device=node.device)
    gain = _predicted(trie, depth, logp, first, slots).masked_fill(slots >= counts[..., None], float("-inf"))
    gain[..., 0].masked_fill_(counts == 0, 0.0)  # what has ended stays in its first slot, with its own score
    total = (gain.log_softmax(2) if normalize else gain).add_(score[..., None])
    ranking = total
    if lengths is not None:
        below = trie.edge_node[_edges(trie, first, slots).view_as(total)]
        leaf = trie.leaf[torch.where(ended[..., None], node[..., None], below)]
        ranking = total / torch.where(leaf >= 0, lengths[leaf.clamp(min=0)], depth + 1)
    best, index = _top(ranking.reshape(users, -1), min(beams, kept * most))
    parent = index // most
    edge = _clamped(trie, first.view_as(node).gather(1, parent) + index % most)
    nodes = torch.where(ended.gather(1, parent), node.gather(1, parent), trie.edge_node[edge])
    return parent, trie.edge_token[edge], nodes, total.reshape(users, -1).gather(1, index), best


def _predicted(trie: Trie, depth: int, logp: Tensor, first: Tensor, slots: Tensor) -> Tensor:
    """(users, b, slots) predictions of the children in ``slots`` of nodes whose first edges are ``first`` (users x b,), and any
    number where there is no child."""
    if trie.counted[depth]:
        return logp[..., : len(slots)]
    # index_select reads a table three to seven times as fast as brackets do.
    column = trie.edge_token.index_select(0, _edges(trie, first, slots).flatten())
    column = column.sub_(trie.span[depth][0]).clamp_(0, logp.shape[2] - 1)
    return logp.gather(2, column.view(*logp.shape[:2], len(slots)))


def _edges(trie: Trie, first: Tensor, slots: Tensor) -> Tensor:
    """(n, slots) numbers of the edges in ``slots`` behind ``first`` (n,); any edge where a node has fewer."""
    return _clamped(trie, first[:, None] + slots)


def _clamped(trie: Trie, edge: Tensor) -> Tensor:
    return edge.clamp_(max=len(trie.edge_token) - 1)


def _top(flat: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The ``keep`` largest of each row and where they are, best first, ties in index order: topk alone leaves open which of the
    ties at the cut it takes."""
    values, index = flat.topk(min(keep + 1, flat.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]) & ~values[:, 1:].isinf()  # among sequences that there are not any order will do
    if not bool(tied.any()):
        return values[:, :keep], index[:, :keep]
    least, index = values[:, keep - 1 : keep], index[:, :keep]
    if bool(tied[:, keep - 1 :].any()):
        above, equal = flat > least, flat == least
        room = keep - above.sum(dim=1, keepdim=True)
        index = (above | (equal & (equal.cumsum(dim=1) <= room))).nonzero()[:, 1].reshape(len(flat), keep)
    index = index.sort(dim=1).values
    best, order = flat.gather(1, index).sort(dim=1, descending=True, stable=True)
    return best, index.gather(1, order)
