"""The planted world: its data set, its exact posterior, and that titles tell the topic and not the community."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from gr.baselines import METHODS, fit_baseline
from gr.data.dataset import Dataset
from gr.data.planted import EPOCH, Catalogue, Oracle, World, bayes_recall, draw_users, plant
from gr.data.split import LeaveOneOut, Split, prepare_split
from gr.errors import UserError
from gr.files import read_json, write_json
from gr.metrics import target_ranks

SMALL = World(users=500, items=60, topics=4, communities=3, subtopics=2, max_length=20, mean_length=8)


@pytest.fixture(scope="module")
def default() -> tuple[Oracle, list[np.ndarray], np.ndarray]:
    """The default world's oracle, each user's history without the last item, and the last item."""
    oracle = Oracle(World())
    sequences, _ = draw_users(oracle.catalogue)
    return oracle, [s[:-1] for s in sequences], np.array([s[-1] for s in sequences])


# --- the posterior ---


def step_probability(catalogue: Catalogue, item: int, t: int, c: int, last: int | None) -> float:
    """P(item | t, c, last) from the module's formula, written without the module's arrays."""
    world = catalogue.world
    w = [1 / rank**world.zipf for rank in catalogue.popularity_rank.tolist()]
    liking = [1 / rank**world.favourites for rank in catalogue.community_rank.tolist()]

    def within(members: list[int], weight: list[float] = w) -> float:
        return weight[item] / sum(weight[j] for j in members) if item in members else 0.0

    everything = list(range(world.items))
    topic = [j for j in everything if catalogue.topic[j] == t]
    community = [j for j in everything if catalogue.community[j] == c]
    semantic = within(topic)
    if last is not None:
        following = catalogue.follows[catalogue.subtopic[last]]
        narrow = [j for j in topic if catalogue.subtopic[j] == following]
        semantic = world.focus * within(narrow) + (1 - world.focus) * semantic
    return world.si * semantic + world.cf * within(community, liking) + world.noise * within(everything)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 50),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(0.5, 0.3, 0.2), (0.9, 0.05, 0.05), (0.0, 0.6, 0.4), (0.7, 0.0, 0.3), (0.0, 0.0, 1.0)]),
    st.floats(0, 1),
    st.lists(st.integers(0, 11), max_size=6),
)
def test_predictive_is_the_enumerated_bayes_rule(
    seed: int, classes: tuple[int, int, int], mix: tuple[float, float, float], focus: float, history: list[int]
) -> None:
    topics, communities, subtopics = classes
    si, cf, noise = mix
    world = World(
        items=12, topics=topics, communities=communities, subtopics=subtopics, si=si, cf=cf, noise=noise, focus=focus, seed=seed
    )
    oracle = Oracle(world)
    joint = np.zeros((topics, communities))
    following = np.zeros((topics, communities, 12))
    for t in range(topics):
        for c in range(communities):
            steps = zip(history, [None, *history], strict=False)
            joint[t, c] = np.prod([step_probability(oracle.catalogue, i, t, c, last) for i, last in steps])
            last = history[-1] if history else None
            following[t, c] = [step_probability(oracle.catalogue, i, t, c, last) for i in range(12)]
    joint /= joint.sum()
    np.testing.assert_allclose(oracle.posterior([np.array(history, dtype=int)])[0], joint, rtol=1e-9, atol=1e-14)
    expected = (joint[:, :, None] * following).sum(axis=(0, 1))
    np.testing.assert_allclose(oracle.predictive(np.array(history, dtype=int)), expected, rtol=1e-9)


def test_predictive_sums_to_one_and_does_not_depend_on_the_batch(default: tuple[Oracle, list[np.ndarray], np.ndarray]) -> None:
    oracle, histories, _ = default
    some = [np.empty(0, dtype=int), *histories[:300]]
    p = oracle.predictive_batch(some)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-12)
    assert (p > 0).all()
    for row in (0, 1, 77):
        np.testing.assert_allclose(p[row], oracle.predictive(some[row]), rtol=1e-12)


def test_frequencies_of_the_generator_match_the_predictive_distribution() -> None:
    """Simulated users who share a first item: the frequencies of their second item are the oracle's prediction (chi-square)."""
    world = World(users=200_000, items=12, topics=2, communities=2, subtopics=3, min_length=2, mean_length=2, max_length=2)
    oracle = Oracle(world)
    pairs = np.array(draw_users(oracle.catalogue)[0])
    first = int(np.argmax(oracle.catalogue.weight))
    second = pairs[pairs[:, 0] == first, 1]
    expected = oracle.predictive(np.array([first])) * second.size
    chi2 = ((np.bincount(second, minlength=12) - expected) ** 2 / expected).sum()
    assert second.size > 10_000
    assert chi2 < 31.3  # 99.9% point with 11 degrees of freedom


# --- the best reachable recall ---


def sampling_error(hits: np.ndarray) -> float:
    return float(np.std(hits) / np.sqrt(hits.size))


def test_realised_recall_of_the_oracle_agrees_with_the_expected(default: tuple[Oracle, list[np.ndarray], np.ndarray]) -> None:
    oracle, histories, targets = default
    recall = bayes_recall(oracle, histories, targets)
    for k in (1, 5, 10, 20):
        p = recall[f"expected_recall@{k}"]
        assert abs(recall[f"recall@{k}"] - p) < 3.5 * np.sqrt(p * (1 - p) / targets.size)


def perturbed(oracle: Oracle, histories: list[np.ndarray], how: str) -> np.ndarray:
    """Rankings of recommenders that know almost everything: the oracle with one thing wrong, or told to favour the history."""
    world, rng = oracle.world, np.random.default_rng(3)
    if how == "noisy":
        p = oracle.predictive_batch(histories)
        return np.argsort(-p * rng.lognormal(0, 0.3, p.shape), axis=1)[:, :20]
    if how == "history first":
        p = oracle.predictive_batch(histories)
        for row, history in zip(p, histories, strict=True):
            row[history] += 1
        return np.argsort(-p, axis=1)[:, :20]
    changes = {
        "no order": {"focus": 0.0},
        "no community": {"cf": 0.0, "noise": world.cf + world.noise},
        "no topic": {"si": 0.0, "noise": world.si + world.noise},
    }
    wrong = Oracle(world.model_copy(update=changes[how]))
    return wrong.rank(histories, 20)


@pytest.mark.parametrize("how", ["noisy", "history first", "no order", "no community", "no topic"])
def test_no_altered_oracle_exceeds_the_bound(how: str, default: tuple[Oracle, list[np.ndarray], np.ndarray]) -> None:
    oracle, histories, targets = default
    p = oracle.predictive_batch(histories)
    ranked = perturbed(oracle, histories, how)
    ranks = target_ranks(ranked, targets)
    bound = bayes_recall(oracle, histories, targets)
    for k in (1, 5, 10, 20):
        expected = np.take_along_axis(p, ranked[:, :k].astype(int), axis=1).sum(axis=1)
        best = np.sort(p, axis=1)[:, -k:].sum(axis=1)
        assert bound[f"expected_recall@{k}"] == pytest.approx(best.mean(), rel=1e-12)
        assert expected.mean() < best.mean() - 1e-3  # the alteration does cost something
        hits = (ranks > 0) & (ranks <= k)
        assert hits.mean() < best.mean() + 3.5 * sampling_error(hits)


@pytest.fixture(scope="module")
def planted_split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Split]:
    folder = tmp_path_factory.mktemp("planted")
    plant(World(), folder / "dataset")
    (folder / "split").mkdir()
    prepare_split(Dataset(folder / "dataset"), LeaveOneOut(), folder / "split")
    return folder / "dataset", Split(folder / "split")


@pytest.mark.parametrize("method", METHODS)
def test_no_baseline_exceeds_the_bound_and_each_learns(method: str, planted_split: tuple[Path, Split]) -> None:
    dataset, split = planted_split
    users = list(split.evaluation_users("test"))
    histories, targets = [u.history for u in users], np.array([u.target for u in users])
    hits = target_ranks(fit_baseline(method, split).rank(histories, 10), targets) > 0
    bound = bayes_recall(Oracle.load(dataset), histories, targets)["expected_recall@10"]
    assert 2.5 * 10 / 600 < hits.mean() < bound + 3.5 * sampling_error(hits)


# --- what a title tells ---


@pytest.fixture(scope="module")
def large() -> tuple[Catalogue, list[str]]:
    """A catalogue of 6000 items, with titles and attributes joined into one text each."""
    catalogue = Catalogue(World(items=6000))
    return catalogue, [" ".join((title, *attributes)) for title, attributes in catalogue.titles()]


@pytest.mark.parametrize("model", [MultinomialNB(), LogisticRegression(max_iter=200)])
@pytest.mark.parametrize("cut", [600, 6000])
def test_text_tells_topic_and_subtopic_but_not_community(cut: int, model: object, large: tuple[Catalogue, list[str]]) -> None:
    catalogue, texts = (
        large if cut == 6000 else (Catalogue(World(items=600)), [t for t, _ in Catalogue(World(items=600)).titles()])
    )
    words = CountVectorizer(ngram_range=(1, 2) if cut == 6000 else (1, 1)).fit_transform(texts)
    train = np.arange(len(texts)) % 3 > 0

    def accuracy(classes: np.ndarray) -> float:
        return float((model.fit(words[train], classes[train]).predict(words[~train]) == classes[~train]).mean())  # type: ignore[attr-defined]

    assert accuracy(catalogue.topic) > 0.97
    assert accuracy(catalogue.subtopic) > 0.97
    chance = 1 / catalogue.world.communities
    assert abs(accuracy(catalogue.community) - chance) < 4 * np.sqrt(chance * (1 - chance) / (~train).sum())


def test_titles_are_unique_and_of_readable_length(large: tuple[Catalogue, list[str]]) -> None:
    titles = [title for title, _ in large[0].titles()]
    assert len(set(titles)) == len(titles)
    assert {len(title.split()) for title in titles} == {6}


def test_every_class_has_items_and_topic_is_independent_of_community(large: tuple[Catalogue, list[str]]) -> None:
    catalogue = large[0]
    world = catalogue.world
    assert np.bincount(catalogue.cell, minlength=world.topics * world.subtopics).min() >= 1
    for c in range(world.communities):
        members = catalogue.community == c
        assert sorted(catalogue.community_rank[members]) == list(range(1, members.sum() + 1))
    table = np.zeros((world.topics, world.communities))
    np.add.at(table, (catalogue.topic, catalogue.community), 1)
    expected = world.items / table.size
    freedom = (world.topics - 1) * (world.communities - 1)
    chi2 = ((table - expected) ** 2 / expected).sum()
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


# --- the data set folder ---


def test_the_folder_holds_what_was_drawn_and_is_deterministic(tmp_path: Path) -> None:
    plant(SMALL, tmp_path / "a")
    plant(SMALL, tmp_path / "b")
    plant(SMALL.model_copy(update={"seed": 1}), tmp_path / "c")
    dataset = Dataset(tmp_path / "a")
    dataset.verify()
    assert dataset.fingerprint == Dataset(tmp_path / "b").fingerprint != Dataset(tmp_path / "c").fingerprint
    assert dataset.counts["users"] == 500
    assert dataset.counts["items"] == 60
    oracle = Oracle.load(tmp_path / "a")
    assert oracle.world == SMALL
    sequences, times = draw_users(oracle.catalogue)
    for user, items, seconds in zip(dataset.users(), sequences, times, strict=True):
        assert user.items == items.tolist()
        assert user.timestamps == seconds.tolist()
    titles = dataset.items()["title"].to_pylist()
    assert titles == [title for title, _ in oracle.catalogue.titles()]


def test_lengths_and_times_are_plausible() -> None:
    world = World(users=3000, mean_length=12, min_length=5, max_length=40)
    sequences, times = draw_users(Catalogue(world))
    lengths = np.array([len(s) for s in sequences])
    assert lengths.min() == 5
    assert lengths.max() <= 40
    assert abs(lengths.mean() - 12) < 0.5
    assert all((np.diff(t) > 0).all() for t in times)
    first, last = min(t[0] for t in times), max(t[-1] for t in times)
    assert EPOCH <= first < EPOCH + 30 * 86_400
    assert EPOCH + 700 * 86_400 < last < EPOCH + 730 * 86_400


def test_more_users_do_not_change_the_catalogue() -> None:
    assert Catalogue(SMALL).fingerprint == Catalogue(SMALL.model_copy(update={"users": 7})).fingerprint


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"si": 0.5, "cf": 0.5}, "must sum to 1"),
        ({"items": 10}, "at least"),
        ({"topics": 500}, "there are words for"),
        ({"min_length": 9, "mean_length": 5}, "must be in this order"),
    ],
)
def test_impossible_worlds_are_refused(knobs: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        World.model_validate(knobs)


def test_unknown_knobs_are_refused() -> None:
    with pytest.raises(ValidationError, match="useers"):
        World.model_validate({"useers": 3})


def test_oracle_refuses_other_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no world\.json"):
        Oracle.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world": SMALL.model_dump() | {"seed": 5}}, "not the world that the manifest beside it names"),
        ({"world": SMALL.model_dump() | {"si": 0.3, "cf": 0.5}}, "not the world that the manifest beside it names"),
        ({"world": SMALL.model_dump() | {"noise": 0.1, "si": 0.6}}, "not the world that the manifest beside it names"),
        ({"world": SMALL.model_dump() | {"zipf": 0.5}}, "not the world that the manifest beside it names"),
        ({"world": [1]}, "not the world that the manifest beside it names"),
        ({"catalogue": "0" * 64}, "another catalogue"),
    ],
)
def test_oracle_refuses_a_world_that_was_tampered_with(tmp_path: Path, change: dict[str, object], words: str) -> None:
    plant(SMALL, tmp_path / "a")
    file = tmp_path / "a" / "world.json"
    write_json(file, read_json(file) | change)
    with pytest.raises(UserError, match=words):
        Oracle.load(tmp_path / "a")
    whole = file.read_text()
    for damaged in (whole[: len(whole) // 2], "[]"):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"world\.json: damaged"):
            Oracle.load(tmp_path / "a")


def test_oracle_refuses_impossible_histories() -> None:
    oracle = Oracle(SMALL.model_copy(update={"si": 1.0, "cf": 0.0, "noise": 0.0}))
    topic = oracle.catalogue.topic
    other = np.array([0, int(np.flatnonzero(topic != topic[0])[0])])
    with pytest.raises(ValueError, match="impossible"):
        oracle.predictive(other)
    with pytest.raises(ValueError, match="outside"):
        oracle.predictive(np.array([60]))
