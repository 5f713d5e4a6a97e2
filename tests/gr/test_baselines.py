"""The baselines against plain-Python counts, their protocol, and their known numbers on Amazon Beauty."""

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr import baselines
from gr.baselines import METHODS, Baseline, count_baseline, fit_baseline
from gr.data.dataset import Dataset
from gr.data.importer import import_dataset
from gr.data.planted import World, plant
from gr.data.split import LeaveOneOut, Split, prepare_split
from gr.errors import UserError
from gr.metrics import ranking_metrics, target_ranks

BEAUTY = Path(__file__).parents[3] / "shared" / "data" / "amazon-beauty"
N_ITEMS = 9


def shard(users: list[tuple[list[int], int]]) -> pa.Table:
    """A shard of (items, n_train) users."""
    return pa.table(
        {
            "items": pa.array([items for items, _ in users], pa.list_(pa.int32())),
            "n_train": pa.array([n for _, n in users], pa.int32()),
        }
    )


users_lists = st.lists(
    st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=8).flatmap(
        lambda s: st.tuples(st.just(s), st.integers(0, len(s)))
    ),
    min_size=1,
    max_size=8,
)


def markov_table(sequences: list[list[int]]) -> np.ndarray:
    table = np.zeros((N_ITEMS, N_ITEMS))
    for s in sequences:
        for i in range(len(s)):
            for d in (1, 2, 3):
                if i + d < len(s):
                    table[s[i], s[i + d]] += 1 / d
    return table


def cosine_table(sequences: list[list[int]], neighbours: int) -> np.ndarray:
    sets = [set(s) for s in sequences]
    table = np.zeros((N_ITEMS, N_ITEMS))
    for a in range(N_ITEMS):
        for b in range(N_ITEMS):
            both = sum(a in s and b in s for s in sets)
            if a != b and both:
                table[a, b] = both / np.sqrt(sum(a in s for s in sets) * sum(b in s for s in sets))
        table[a, np.argsort(-table[a], kind="stable")[neighbours:]] = 0
    return table


def scores_by_hand(method: str, table: np.ndarray, history: list[int]) -> np.ndarray:
    if method == "item-knn":
        return table[sorted(set(history))].sum(axis=0)
    return sum((table[a] / r for r, a in enumerate(history[:-4:-1], start=1)), np.zeros(N_ITEMS))


@settings(max_examples=80, deadline=None)
@given(users_lists, st.lists(st.integers(0, N_ITEMS - 1), max_size=7), st.sampled_from(METHODS))
def test_tables_and_rankings_are_those_counted_by_hand(
    users: list[tuple[list[int], int]], history: list[int], method: str
) -> None:
    sequences = [items[:n] for items, n in users]
    popularity = Counter(i for s in sequences for i in s)
    fitted = count_baseline(method, [shard(users)], N_ITEMS)
    assert fitted.popularity.tolist() == [popularity[i] for i in range(N_ITEMS)]
    if method == "popularity":
        scores = np.zeros(N_ITEMS)
    else:
        table = markov_table(sequences) if method == "markov" else cosine_table(sequences, N_ITEMS)
        assert fitted.weights is not None
        np.testing.assert_allclose(fitted.weights.toarray(), table, rtol=1e-6)
        scores = scores_by_hand(method, table, history)
    ranked = fitted.rank([np.array(history, dtype=np.int32)], N_ITEMS)[0].tolist()
    assert sorted(ranked) == list(range(N_ITEMS))  # the full catalogue, the history's items among it
    for first, second in pairwise(ranked):
        assert scores[first] > scores[second] - 1e-5
        if scores[first] == scores[second] == 0:
            assert popularity[first] >= popularity[second]


@given(users_lists, users_lists)
@settings(max_examples=20, deadline=None)
def test_shards_add_up(a: list[tuple[list[int], int]], b: list[tuple[list[int], int]]) -> None:
    for method in METHODS:
        apart, whole = count_baseline(method, [shard(a), shard(b)], N_ITEMS), count_baseline(method, [shard(a + b)], N_ITEMS)
        history = [np.array([1, 2, 3])]
        np.testing.assert_array_equal(apart.rank(history, 5), whole.rank(history, 5))


def test_each_item_keeps_its_nearest_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "NEIGHBOURS", 2)
    users = [([0, 1, 2], 3), ([0, 1, 2, 3], 4), ([0, 1], 2), ([4, 5], 2)]
    fitted = count_baseline("item-knn", [shard(users)], N_ITEMS)
    assert fitted.weights is not None
    np.testing.assert_allclose(fitted.weights.toarray()[:4], cosine_table([s for s, _ in users], 2)[:4], rtol=1e-6)
    assert fitted.n_cf == N_ITEMS + 2 * 4 + 2


def test_ties_do_not_follow_the_catalogue_order() -> None:
    """Forty items, each once: all tie, and the order must be fixed and unrelated to the item numbers."""
    users = [([i], 1) for i in range(40)]
    fitted = count_baseline("popularity", [shard(users)], 40)
    order = fitted.rank([np.array([], dtype=np.int32)], 40)[0]
    np.testing.assert_array_equal(order, count_baseline("markov", [shard(users[::-1])], 40).rank([np.array([3])], 40)[0])
    assert abs(np.corrcoef(order, np.arange(40))[0, 1]) < 0.5
    markov = Baseline("markov", fitted.popularity, count_baseline("markov", [shard([([0, 7], 2), ([0, 9], 2)])], 40).weights)
    first = markov.rank([np.array([0])], 2)[0].tolist()
    assert first == [i for i in order.tolist() if i in (7, 9)]


def test_markov_weighs_the_last_three_items_by_recency() -> None:
    fitted = count_baseline("markov", [shard([([0, 4], 2), ([1, 5], 2), ([2, 6], 2), ([3, 7], 2)])], N_ITEMS)
    histories = [np.array(h) for h in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 1])]
    ranked = fitted.rank(histories, 3).tolist()
    assert ranked[0] == [7, 6, 5]
    assert ranked[1] == [4, 5, 6]
    assert ranked[2][:2] == [5, 7]  # 1 + 1/3 against 1/2


def test_more_places_than_items_are_padded_and_empty_histories_get_popularity() -> None:
    users = [([0, 1, 2, 1], 4), ([2, 1, 0], 3)]
    for method in METHODS:
        ranked = count_baseline(method, [shard(users)], 3).rank([np.array([], dtype=np.int32), np.array([0])], 5)
        assert ranked.dtype == np.int32
        assert ranked[:, 3:].tolist() == [[-1, -1], [-1, -1]]
        assert ranked[0, 0] == 1  # the most popular


def test_large_batches_rank_like_single_users(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    users = [(rng.integers(50, size=12).tolist(), 10) for _ in range(60)]
    histories = [np.array(items) for items, _ in users]
    monkeypatch.setattr(baselines, "SCORE_CELLS", 50 * 7)
    for method in METHODS:
        fitted = count_baseline(method, [shard(users)], 50)
        together = fitted.rank(histories, 10)
        assert together.tolist() == [fitted.rank([h], 10)[0].tolist() for h in histories]


def test_unknown_method_is_named(tmp_path: Path) -> None:
    plant(World(users=20, items=10, topics=2, communities=2, subtopics=2), tmp_path / "d")
    (tmp_path / "s").mkdir()
    prepare_split(Dataset(tmp_path / "d"), LeaveOneOut(), tmp_path / "s")
    with pytest.raises(UserError, match=r"'item_knn'; one of popularity, item-knn, markov"):
        fit_baseline("item_knn", Split(tmp_path / "s"))


# --- Amazon Beauty ---


@pytest.fixture(scope="module")
def beauty(tmp_path_factory: pytest.TempPathFactory) -> Split:
    if not BEAUTY.is_dir():
        pytest.skip(f"{BEAUTY} is not there")
    folder = tmp_path_factory.mktemp("beauty")
    import_dataset("jsonl", [BEAUTY / "sequences.jsonl.gz", BEAUTY / "items.jsonl.gz"], folder / "dataset")
    (folder / "split").mkdir()
    prepare_split(Dataset(folder / "dataset"), LeaveOneOut(), folder / "split")
    return Split(folder / "split")


# Recall@5 and @10 on the test targets. The published floors are popularity .017 and Markov .0605 / .081. The first counts the
# validation items alone, which lie nearer in time (.0169 here when counted so; the training part gives .0112). The second leaves
# out the history's items, never targets in these data (.0592 / .0809 here when left out); this protocol leaves nothing out.
EXPECTED = {"popularity": (0.0073, 0.0112), "item-knn": (0.0269, 0.0449), "markov": (0.0564, 0.0781)}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_beauty_floors(method: str, beauty: Split) -> None:
    started = time.process_time()
    users = list(beauty.evaluation_users("test"))
    ranked = fit_baseline(method, beauty).rank([u.history for u in users], 20)
    metrics = ranking_metrics(target_ranks(ranked, np.array([u.target for u in users])))
    assert len(users) == 22_363
    assert (metrics["recall@5"], metrics["recall@10"]) == pytest.approx(EXPECTED[method], abs=3e-4)
    assert time.process_time() - started < 60
