"""Recall@k and NDCG@k against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr.metrics import COLD_AT, RECALL_AT, TOP_K, cold_metrics, ranking_metrics, target_ranks, within

ranks_of_users = st.lists(st.integers(0, 30), min_size=1, max_size=50)


@given(ranks_of_users)
def test_metrics_are_their_definitions(ranks: list[int]) -> None:
    metrics = ranking_metrics(np.array(ranks))
    for k in RECALL_AT:
        assert metrics[f"recall@{k}"] == pytest.approx(sum(0 < r <= k for r in ranks) / len(ranks))
    for k in (5, 10, 20):
        assert metrics[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(1 + r) for r in ranks if 0 < r <= k) / len(ranks))


@given(ranks_of_users, st.integers(1, 25))
def test_metrics_that_look_deeper_than_the_list_are_left_out(ranks: list[int], returned: int) -> None:
    metrics = ranking_metrics(np.array(ranks)) | {"ndcg@10_cold": 0.5, "users_cold": 7}
    kept = within(metrics, returned)
    assert kept.items() <= metrics.items() and kept["users_cold"] == 7
    assert {name for name in metrics if name not in kept} == {
        *(f"recall@{k}" for k in RECALL_AT if k > returned), *(f"ndcg@{k}" for k in (5, 10, 20) if k > returned),
        *(["ndcg@10_cold"] if returned < 10 else []),
    }  # fmt: skip


@given(st.integers(2, 40), st.integers(0, 10_000))
def test_rank_is_the_place_in_the_list(items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(items)[:TOP_K] for _ in range(5)])
    targets = rng.integers(0, items, 5)
    expected = [list(row).index(t) + 1 if t in row else 0 for row, t in zip(ranked, targets, strict=True)]
    assert target_ranks(ranked, targets).tolist() == expected


def test_missing_places_are_no_hits_and_no_users_is_an_error() -> None:
    assert target_ranks(np.array([[2, -1, -1]]), np.array([5])).tolist() == [0]
    with pytest.raises(ValueError, match="no users"):
        ranking_metrics(np.array([], dtype=np.int32))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=50))
def test_cold_metrics_are_those_of_the_users_with_a_cold_target(users: list[tuple[int, int]]) -> None:
    ranks, popularity = (np.array(column) for column in zip(*users, strict=True))
    cold = [r for r, p in users if p <= COLD_AT]
    found = cold_metrics(ranks, popularity)
    assert found["users_cold"] == len(cold)
    if not cold:
        assert found.keys() == {"users_cold"}
        return
    assert found["recall@10_cold"] == pytest.approx(sum(0 < r <= 10 for r in cold) / len(cold))
    assert found["ndcg@10_cold"] == pytest.approx(sum(1 / math.log2(1 + r) for r in cold if 0 < r <= 10) / len(cold))
