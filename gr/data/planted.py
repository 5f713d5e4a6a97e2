"""The planted world: a catalogue and users whose best possible recommender is known exactly.

Every item has a topic and a subtopic, both readable from its title (semantic information, SI), and a community, dealt at random
and not readable from anything but behaviour (collaborative filtering, CF). Every user has one favourite topic t and one
community c, drawn uniformly and independently, never shown. Each item of a sequence, after the item ``last``, is drawn from

    P(i | t, c, last) = si · S(i | t, last) + cf · G(i | c) + noise · w_i / Σ w

- w_i is Zipf's popularity, 1 / rank^zipf, over a random order of the catalogue;
- S is w within the topic t, and with probability ``focus`` narrowed to the subtopic that follows that of ``last`` in a fixed
  ring of subtopics, the same in all topics (no narrowing for a user's first item);
- G is 1 / rank^favourites, over a random order of the items of the community c that has nothing to do with popularity.

Repeats are allowed: draws are then independent given (t, c, last), the posterior is a plain product, and no class can run out
in a long sequence. It also suits the protocol, in which every paradigm ranks the full catalogue with the history in it.
``last`` is observed, so the order of a sequence matters while the posterior of the two latents stays exact (`Oracle`). Lengths
and times depend on neither latent, so they tell nothing.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gr.data.dataset import Dataset, DatasetWriter, Item, User
from gr.data.planted_titles import MAX_SUBTOPICS, MAX_TOPICS, TITLES_PER_CELL, compose_titles
from gr.errors import UserError
from gr.files import read_object, write_json
from gr.metrics import RECALL_AT, target_ranks

WORLD_FILE = "world.json"
EPOCH = 1_672_531_200  # 2023-01-01T00:00:00Z, the first second of the two years in which all users are active
DAY = 86_400
ACTIVE_DAYS = 730
ORACLE_USERS = 1024  # users whose posterior is held at once: 1024 · topics · communities doubles

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class World(BaseModel):
    """The generator's configuration; it determines the data set and its exact posterior.

    The defaults give a small model something to learn at every size: popularity first, then topics, communities (which no text
    tells) and the ring of subtopics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: int = Field(4000, ge=1)
    items: int = Field(600, ge=1)
    si: float = Field(0.5, ge=0, le=1)
    cf: float = Field(0.3, ge=0, le=1)
    noise: float = Field(0.2, ge=0, le=1)
    seed: int = Field(0, ge=0)
    topics: int = Field(16, ge=1)
    communities: int = Field(16, ge=1)
    subtopics: int = Field(5, ge=1)
    focus: float = Field(0.7, ge=0, le=1)
    zipf: float = Field(0.4, ge=0, le=3)
    favourites: float = Field(1.0, ge=0, le=3)
    min_length: int = Field(5, ge=1)
    mean_length: float = Field(20, ge=1)
    max_length: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        total = self.si + self.cf + self.noise
        if abs(total - 1) > 1e-9:
            raise UserError(f"world: si + cf + noise = {self.si} + {self.cf} + {self.noise} = {total:g}; they must sum to 1")
        if self.topics > MAX_TOPICS or self.subtopics > MAX_SUBTOPICS:
            raise UserError(
                f"world: topics {self.topics}, subtopics {self.subtopics}; there are words for {MAX_TOPICS} and {MAX_SUBTOPICS}"
            )
        cells = self.topics * self.subtopics
        fewest, most = max(cells, self.communities), cells * TITLES_PER_CELL // 2
        if not fewest <= self.items <= most:
            raise UserError(
                f"world: items {self.items}; {self.topics} topics x {self.subtopics} subtopics, {self.communities} communities "
                f"need {fewest} to {most} items (each class at least one, each title once)"
            )
        if not self.min_length <= self.mean_length <= self.max_length:
            raise UserError(
                f"world: lengths min {self.min_length}, mean {self.mean_length:g}, max {self.max_length} must be in this order"
            )
        return self


class Catalogue:
    """The item classes of a world and the three distributions over items; all arrays are (items,)."""

    def __init__(self, world: World) -> None:
        self.world = world
        rng = _stream(world, "catalogue")
        # Dealt like cards, so that no class is empty and class sizes differ by at most one.
        cell = rng.permutation(np.arange(world.items) % (world.topics * world.subtopics))
        self.topic: Ints = cell // world.subtopics
        self.subtopic: Ints = cell % world.subtopics
        self.community: Ints = rng.permutation(np.arange(world.items) % world.communities)
        self.popularity_rank: Ints = rng.permutation(world.items) + 1
        self.community_rank: Ints = _rank_within(self.community, rng.permutation(world.items))
        ring = rng.permutation(world.subtopics)
        self.follows: Ints = np.empty(world.subtopics, dtype=np.int64)
        self.follows[ring] = np.roll(ring, -1)

        self.cell = cell
        self.weight = _zipf(self.popularity_rank, world.zipf)
        self.p_noise: Floats = self.weight / self.weight.sum()
        self.p_topic = _within(self.weight, self.topic)
        self.p_cell = _within(self.weight, self.cell)
        self.liking = _zipf(self.community_rank, world.favourites)
        self.p_community = _within(self.liking, self.community)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the item classes: integers only, so the same on every machine that draws the same catalogue."""
        arrays = (self.topic, self.subtopic, self.community, self.popularity_rank, self.community_rank, self.follows)
        return hashlib.sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()

    def titles(self) -> list[tuple[str, tuple[str, ...]]]:
        return compose_titles(self.topic, self.subtopic, _stream(self.world, "titles"))


def _stream(world: World, part: str) -> np.random.Generator:
    """An own random stream per part, so that more users do not change the catalogue, nor the catalogue's titles its users."""
    return np.random.default_rng([world.seed, ("catalogue", "titles", "users").index(part)])


def _zipf(rank: Ints, exponent: float) -> Floats:
    return (1.0 / rank**exponent).astype(np.float64)


def _within(weight: Floats, group: Ints) -> Floats:
    """Each item's share of its group's weight."""
    share: Floats = weight / np.bincount(group, weights=weight)[group]
    return share


def _rank_within(group: Ints, order: Ints) -> Ints:
    """1-based place of each item in its group when the group is sorted by ``order``."""
    by_group = np.lexsort((order, group))
    sorted_groups = group[by_group]
    rank = np.empty_like(group)
    rank[by_group] = np.arange(group.size) - np.searchsorted(sorted_groups, sorted_groups) + 1
    return rank


class _Draw:
    """Draws items of a given group with probability proportional to weight, for many users at once."""

    def __init__(self, weight: Floats, group: Ints) -> None:
        self.order = np.argsort(group, kind="stable")
        self.edges = np.concatenate([[0.0], np.cumsum(weight[self.order])])
        self.first = np.searchsorted(group[self.order], np.arange(group.max() + 2))

    def __call__(self, group: Ints, u: Floats) -> Ints:
        first, end = self.first[group], self.first[group + 1]
        low, high = self.edges[first], self.edges[end]
        place = np.searchsorted(self.edges, low + u * (high - low), side="right") - 1
        drawn: Ints = self.order[np.clip(place, first, end - 1)]  # rounding must not leave the group
        return drawn


def draw_users(catalogue: Catalogue) -> tuple[list[Ints], list[Ints]]:
    """Every user's items and Unix seconds, oldest first, drawn step by step for all users together."""
    world, rng = catalogue.world, _stream(catalogue.world, "users")
    lengths = _lengths(world, rng)
    topic = rng.integers(world.topics, size=world.users)
    community = rng.integers(world.communities, size=world.users)
    w = catalogue.weight
    of_all, of_topic = _Draw(w, np.zeros(world.items, dtype=np.int64)), _Draw(w, catalogue.topic)
    of_cell, of_community = _Draw(w, catalogue.cell), _Draw(catalogue.liking, catalogue.community)

    sequences = np.zeros((world.users, int(lengths.max())), dtype=np.int64)
    for step in range(sequences.shape[1]):
        source, narrow, u = rng.random((3, world.users))
        items = of_all(np.zeros(world.users, dtype=np.int64), u)
        by_topic = of_topic(topic, u)
        if step > 0:
            following = catalogue.follows[catalogue.subtopic[sequences[:, step - 1]]]
            by_topic = np.where(narrow < world.focus, of_cell(topic * world.subtopics + following, u), by_topic)
        items = np.where(source < world.si + world.cf, of_community(community, u), items)
        sequences[:, step] = np.where(source < world.si, by_topic, items)
    times = _times(lengths, sequences.shape[1], rng)
    return [s[:n] for s, n in zip(sequences, lengths, strict=True)], [t[:n] for t, n in zip(times, lengths, strict=True)]


def _lengths(world: World, rng: np.random.Generator) -> Ints:
    """Geometric beyond the minimum, cut at the maximum (which lowers the mean a little)."""
    beyond = rng.geometric(1.0 / (world.mean_length - world.min_length + 1), size=world.users) - 1
    return np.minimum(world.min_length + beyond, world.max_length).astype(np.int64)


def _times(lengths: Ints, longest: int, rng: np.random.Generator) -> Ints:
    """(users, longest) strictly increasing seconds: each user is active in a window of 30 to 365 days within the two years."""
    window = rng.integers(30, 366, size=lengths.size)
    start = rng.integers(0, (ACTIVE_DAYS - window) * DAY)
    u = rng.random((lengths.size, longest))
    u[np.arange(longest) >= lengths[:, None]] = 1.0  # places past the end sort last
    seconds = (np.sort(u, axis=1) * (window * DAY - longest)[:, None]).astype(np.int64)
    return EPOCH + start[:, None] + seconds + np.arange(longest)


def plant(world: World, out: Path) -> None:
    """Writes the world's data set folder to ``out``, with ``world.json``; the same world gives the same bytes."""
    catalogue = Catalogue(world)
    items = [Item(f"p{i:07d}", title, attributes) for i, (title, attributes) in enumerate(catalogue.titles())]
    sequences, times = draw_users(catalogue)
    source = {"format": "planted", **world.model_dump()}
    with DatasetWriter(out, "planted", source, items) as writer:
        for number, (sequence, seconds) in enumerate(zip(sequences, times, strict=True)):
            writer.add(User(f"u{number:07d}", sequence.tolist(), seconds.tolist()))
        write_json(writer.path / WORLD_FILE, {"world": world.model_dump(), "catalogue": catalogue.fingerprint})


class Oracle:
    """The best recommender of a planted world: the exact predictive distribution of the next item given the history.

    By Bayes, P(t, c | h) ∝ Π_j P(h_j | t, c, h_{j-1}) under the uniform prior, and P(next = i | h) is the mean of
    P(i | t, c, last) under it. As the three sources add up, the prediction needs only the two marginals of that posterior.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.catalogue = Catalogue(world)

    @classmethod
    def load(cls, dataset: Path) -> "Oracle":
        """The oracle of a planted data set folder.

        UserError if it has no world, another one than its manifest names, or this installation draws another catalogue from it.
        """
        file = dataset / WORLD_FILE
        if not file.is_file():
            raise UserError(
                f"{dataset}: not a planted data set (no {WORLD_FILE}); only a planted world has a Bayes-optimal recommender"
            )
        stored = read_object(file)
        world = stored.get("world")
        if not isinstance(world, dict) or {"format": "planted", **world} != Dataset(dataset).manifest.get("source"):
            raise UserError(f"{file}: not the world that the manifest beside it names as the source; plant the data again")
        oracle = cls(World.model_validate(world))
        if oracle.catalogue.fingerprint != stored.get("catalogue"):
            raise UserError(
                f"{file}: this version of grscale or numpy draws another catalogue from that seed; plant the data again"
            )
        return oracle

    def _source(self, last: Ints, items: Ints) -> Floats:
        """si · S(items | their own topic, last), by broadcasting; ``last`` is -1 where there is no last item."""
        cat, world = self.catalogue, self.world
        narrowed = world.focus * cat.p_cell[items] * (cat.follows[cat.subtopic[last]] == cat.subtopic[items])
        chained = narrowed + (1 - world.focus) * cat.p_topic[items]
        out: Floats = world.si * np.where(last < 0, cat.p_topic[items], chained)
        return out

    def posterior(self, histories: Sequence[NDArray[np.integer]]) -> Floats:
        """(users, topics, communities): P(t, c | history), each summing to 1; histories are item numbers, oldest first."""
        cat, world = self.catalogue, self.world
        lengths = np.array([len(h) for h in histories], dtype=np.int64)
        padded = np.full((len(histories), int(lengths.max(initial=0))), -1, dtype=np.int64)
        for row, history in zip(padded, histories, strict=True):
            row[: len(history)] = history
        if padded.size and not (padded.min() >= -1 and padded.max() < world.items and (padded >= 0).sum() == lengths.sum()):
            raise ValueError(f"a history has an item outside 0..{world.items - 1}")
        belief = np.full((len(histories), world.topics, world.communities), 1.0 / (world.topics * world.communities))
        for step in range(padded.shape[1]):
            users = np.flatnonzero(lengths > step)
            item = padded[users, step]
            last = padded[users, step - 1] if step > 0 else np.full(users.size, -1)
            likelihood = np.empty((users.size, *belief.shape[1:]))
            likelihood[:] = (world.noise * cat.p_noise[item])[:, None, None]
            rows = np.arange(users.size)
            likelihood[rows, cat.topic[item], :] += self._source(last, item)[:, None]
            likelihood[rows, :, cat.community[item]] += (world.cf * cat.p_community[item])[:, None]
            likelihood *= belief[users]
            total = likelihood.sum(axis=(1, 2), keepdims=True)
            if not (total > 0).all():
                raise ValueError("a history is impossible in this world (it has no noise)")
            belief[users] = likelihood / total
        return belief

    def predictive_batch(self, histories: Sequence[NDArray[np.integer]]) -> Floats:
        """(users, items): P(next item | history), each row summing to 1."""
        cat, world = self.catalogue, self.world
        belief = self.posterior(histories)
        last = np.array([h[-1] if len(h) else -1 for h in histories], dtype=np.int64)
        p = self._source(last[:, None], np.arange(world.items)[None, :])
        p *= belief.sum(axis=2)[:, cat.topic]
        p += world.cf * belief.sum(axis=1)[:, cat.community] * cat.p_community
        p += world.noise * cat.p_noise
        return p

    def predictive(self, history: NDArray[np.integer]) -> Floats:
        """(items,): P(next item | history)."""
        row: Floats = self.predictive_batch([history])[0]
        return row

    def rank(self, histories: Sequence[NDArray[np.integer]], top_k: int) -> NDArray[np.int32]:
        """(users, top_k) the most probable next items, best first, -1 past the end of a smaller catalogue."""
        return self._rank(histories, top_k)[0]

    def _rank(self, histories: Sequence[NDArray[np.integer]], top_k: int) -> tuple[NDArray[np.int32], Floats]:
        """The ranking and its probabilities, both (users, top_k)."""
        ranked = np.full((len(histories), top_k), -1, dtype=np.int32)
        probability = np.zeros((len(histories), top_k))
        k = min(top_k, self.world.items)
        for start in range(0, len(histories), ORACLE_USERS):
            batch = slice(start, start + ORACLE_USERS)
            p = self.predictive_batch(histories[batch])
            best = np.argsort(-p, axis=1, kind="stable")[:, :k]
            ranked[batch, :k] = best
            probability[batch, :k] = np.take_along_axis(p, best, axis=1)
        return ranked, probability


def bayes_recall(
    oracle: Oracle,
    histories: Sequence[NDArray[np.integer]],
    targets: NDArray[np.integer],
    at: tuple[int, ...] = RECALL_AT,
) -> dict[str, float]:
    """Bayes-optimal Recall@k in two ways, ``expected_recall@k`` and ``recall@k``, as means over users.

    Expected: the sum of the k largest predictive probabilities, the exact optimum given these histories, free of the targets' own
    luck; no recommender has a higher expectation. Realised: the oracle's ranking against the actual ``targets`` (users,), for
    comparison with models measured on the same targets.
    """
    ranked, probability = oracle._rank(histories, max(at))
    ranks = target_ranks(ranked, targets)
    out = {f"expected_recall@{k}": float(probability[:, :k].sum(axis=1).mean()) for k in at}
    return out | {f"recall@{k}": float(np.mean((ranks > 0) & (ranks <= k))) for k in at}
