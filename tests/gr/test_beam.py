"""The trie and the beam search against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.beam import Beams, beam_search
from gr.trie import Trie

VOCAB = 7


class Table:
    """A stepper whose next-token log-probabilities depend on the whole prefix, through a hash."""

    def __init__(self, users: int, seed: int) -> None:
        self.users, self.seed = users, seed
        self.prefixes: list[list[tuple[int, ...]]] = [[()] for _ in range(users)]
        self.ranked = set(range(users))

    def logp(self, user: int, prefix: tuple[int, ...]) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, user, len(prefix), *prefix))
        return torch.log_softmax(torch.from_numpy(rng.normal(size=VOCAB)), 0)

    def start(self, span: tuple[int, int]) -> torch.Tensor:
        return torch.stack([self.logp(u, ()) for u in range(self.users)])[:, slice(*span)]

    def advance(self, beams: Beams, span: tuple[int, int]) -> torch.Tensor:
        assert beams.running.any(dim=1).all() and set(beams.users.tolist()) <= self.ranked, (
            "who has been ranked does not come back"
        )
        self.ranked = set(beams.users.tolist())
        unread = torch.full((VOCAB,), float("nan"), dtype=torch.float64)
        rows = []
        each = (x.tolist() for x in (beams.users, beams.parents, beams.tokens, beams.running))
        for u, parent, token, running in zip(*each, strict=True):
            self.prefixes[u] = [(*self.prefixes[u][p], t) for p, t in zip(parent, token, strict=True)]
            now = [self.logp(u, x) if runs else unread for x, runs in zip(self.prefixes[u], running, strict=True)]
            rows.append(torch.stack(now))
        return torch.stack(rows)[..., slice(*span)]


def brute_force(table: Table, sequences: list[tuple[int, ...]], user: int) -> list[float]:
    return [sum(table.logp(user, s[:i])[t].item() for i, t in enumerate(s)) for s in sequences]


prefix_free = st.sets(st.lists(st.integers(1, VOCAB - 1), max_size=4).map(lambda s: (*s, 0)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(prefix_free, st.integers(0, 1000))
def test_enough_beams_rank_every_sequence_exactly(sequences: set[tuple[int, ...]], seed: int) -> None:
    listed = sorted(sequences, key=lambda s: hash((seed, s)))
    leaf, score = beam_search(Table(3, seed), Trie.build(listed), beams=len(listed) + 2)
    for user in range(3):
        expected = brute_force(Table(3, seed), listed, user)
        order = sorted(range(len(listed)), key=lambda i: -expected[i])
        assert leaf[user].tolist() == [*order, -1, -1]
        assert score[user, : len(listed)].tolist() == pytest.approx(sorted(expected, reverse=True))


@settings(max_examples=30, deadline=None)
@given(prefix_free, st.integers(0, 1000), st.integers(1, 4))
def test_few_beams_stay_in_the_trie_and_score_what_they_return(sequences: set[tuple[int, ...]], seed: int, beams: int) -> None:
    listed = sorted(sequences)
    leaf, score = beam_search(Table(2, seed), Trie.build(listed), beams)
    for user in range(2):
        expected = brute_force(Table(2, seed), listed, user)
        found = [i for i in leaf[user].tolist() if i >= 0]
        assert len(found) == len(set(found)) and found
        assert score[user, : len(found)].tolist() == pytest.approx([expected[i] for i in found])
        assert score[user, : len(found)].tolist() == sorted(score[user, : len(found)].tolist(), reverse=True)


def test_ties_at_the_cut_go_to_the_lower_token_whatever_the_batch() -> None:
    class Flat:
        def start(self, span: tuple[int, int]) -> torch.Tensor:
            return torch.zeros(3, 300)[:, slice(*span)]

        def advance(self, *_: torch.Tensor) -> torch.Tensor:
            raise AssertionError("every sequence has one token")

    leaf, _ = beam_search(Flat(), Trie.build([(t,) for t in range(5, 300)]), beams=20)
    assert leaf.tolist() == [list(range(20))] * 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=30, max_size=30), min_size=1, max_size=4), st.integers(1, 30))
def test_ties_stand_in_order_wherever_they_are(scores: list[list[int]], beams: int) -> None:
    class Given:
        def start(self, span: tuple[int, int]) -> torch.Tensor:
            return -torch.tensor(scores, dtype=torch.float32)[:, slice(*span)]

        def advance(self, *_: torch.Tensor) -> torch.Tensor:
            raise AssertionError("every sequence has one token")

    leaf, _ = beam_search(Given(), Trie.build([(t,) for t in range(30)]), beams)
    assert leaf.tolist() == [np.argsort(row, kind="stable")[:beams].tolist() for row in scores]


def test_trie_holds_its_sequences_and_refuses_prefixes() -> None:
    sequences = [(3, 1, 0), (3, 2), (1,), (3, 1, 4)]
    trie = Trie.build(sequences)
    for number, sequence in enumerate(sequences):
        node = 0
        for token in sequence:
            edges = range(int(trie.first_edge[node]), int(trie.first_edge[node + 1]))
            node = next(int(trie.edge_node[e]) for e in edges if trie.edge_token[e] == token)
        assert int(trie.leaf[node]) == number
    assert trie.span == ((1, 4), (1, 3), (0, 5)) and trie.counted == (False, True, False)
    for bad in ([(1, 2), (1, 2)], [(1, 2), (1,)], [()]):
        with pytest.raises(ValueError, match="repeats or continues"):
            Trie.build(bad)
