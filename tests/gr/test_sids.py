"""Quantizers, the disambiguating digit, and the table of SIDs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from gr.errors import UserError
from gr.sid.collisions import balance, transport
from gr.sid.kmeans import kmeans, squared_distances
from gr.sid.quantizers import assign, residual_kmeans, standardize
from gr.sid.rqvae import rqvae
from gr.sid.sids import SidTable, collision_rate, disambiguate, sid_facts, write_sids


@pytest.fixture
def clustered() -> torch.Tensor:
    """300 points about 4 x 4 centres: coarse ones far apart, fine ones near."""
    generator = torch.Generator().manual_seed(0)
    coarse = 10 * torch.randn(4, 8, generator=generator)
    fine = torch.randn(4, 8, generator=generator)
    rows = torch.arange(320)
    return coarse[rows % 4] + fine[rows // 4 % 4] + 0.01 * torch.randn(320, 8, generator=generator)


def test_residual_kmeans_finds_planted_levels_and_falls_with_each(clustered: torch.Tensor) -> None:
    errors = [
        (residual_kmeans(clustered, levels, 4, seed=0).reconstruction - clustered).square().sum().item() for levels in (1, 2)
    ]
    assert errors[1] < 0.02 * errors[0]
    result = residual_kmeans(clustered, 2, 4, seed=0)
    assert len(result.codes.unique(dim=0)) == 16
    codes, reconstruction = assign(clustered, result.weights["codebooks"])
    assert torch.equal(codes, result.codes)
    assert torch.allclose(reconstruction, result.reconstruction, atol=1e-5)
    assert result.n_parameters == 2 * 4 * 8


def test_normalised_residuals_reconstruct_when_their_scale_is_given(clustered: torch.Tensor) -> None:
    result = residual_kmeans(clustered, 3, 4, seed=0, normalize_residuals=True)
    assert (result.reconstruction - clustered).square().sum() < 0.05 * clustered.square().sum()


def test_quantizers_are_deterministic_by_seed(clustered: torch.Tensor) -> None:
    x = standardize(clustered)
    options = {"hidden": (16,), "latent": 8, "beta": 0.25, "steps": 60, "batch": 64, "lr": 1e-3}
    for one, same, other in (
        [residual_kmeans(x, 2, 8, seed).codes for seed in (1, 1, 2)],
        [rqvae(x, 2, 8, seed, **options).codes for seed in (1, 1, 2)],
    ):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_rqvae_reconstructs_better_with_training_and_restarts_its_dead_codes(clustered: torch.Tensor) -> None:
    x = standardize(clustered)
    errors = []
    for steps in (1, 600):
        result = rqvae(x, 2, 8, 0, hidden=(32,), latent=8, beta=0.25, steps=steps, batch=128, lr=3e-3)
        errors.append((result.reconstruction - x).square().sum(1).mean().item())
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.3
    assert all(len(level.unique()) >= 4 for level in result.codes.T)


def test_kmeans_survives_fewer_points_than_centres() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    centers = kmeans(x, 4, torch.Generator().manual_seed(0))
    assert centers.shape == (4, 2) and torch.isfinite(centers).all()
    assert {tuple(c) for c in centers.tolist()} == {(0.0, 0.0), (1.0, 1.0)}


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 1000))
def test_the_extra_digit_makes_every_sid_unique_and_small(items: int, levels: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (items, levels))
    full = disambiguate(codes)
    assert (full[:, :-1] == codes).all()
    assert len(np.unique(full, axis=0)) == items
    facts = sid_facts(codes, 3)
    assert full[:, -1].max() + 1 == facts["largest_collision"]
    shared = [sum((codes == row).all(1)) > 1 for row in codes]
    assert facts["collision_rate"] == pytest.approx(np.mean(shared))


def test_tokens_of_each_level_lie_in_their_own_range(tmp_path: Path) -> None:
    codes = disambiguate(np.array([[0, 1], [2, 1], [2, 1], [1, 0]]))
    write_sids(tmp_path / "sids.parquet", codes)
    table = SidTable.read(tmp_path / "sids.parquet")
    assert table.tokens.tolist() == [[1, 5, 6], [3, 5, 6], [3, 5, 7], [2, 4, 6]]
    assert table.vocab == 8
    write_sids(tmp_path / "same.parquet", codes[[0, 0]])
    with pytest.raises(UserError, match="same SID"):
        SidTable.read(tmp_path / "same.parquet")


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 1000))
def test_bits_kept_are_the_mutual_information_of_item_and_codes(items: int, levels: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (items, levels))
    facts = sid_facts(codes, 3)
    same = (codes[:, None] == codes[None]).all(axis=2).sum(axis=1)
    # I(item; codes) = H(item) - H(item | codes), and an item is one of `same` alike ones once its codes are known
    assert facts["identity_bits"] == pytest.approx(np.log2(items) - np.log2(same).mean())
    assert facts["identity_bits_of"] == pytest.approx(np.log2(items))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 2), st.integers(2, 8), st.integers(0, 1000))
def test_a_balanced_last_level_tells_apart_all_that_it_can(items: int, prefixes: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, book = torch.randn(items, 3, generator=generator), torch.randn(width, 3, generator=generator)
    prefix = torch.randint(prefixes, (items,), generator=generator)
    codes = torch.stack([prefix, squared_distances(points, book).argmin(1)], 1).numpy()
    out = balance(codes, points, book)
    assert (out[:, 0] == codes[:, 0]).all() and (out[:, 1] >= 0).all() and (out[:, 1] < width).all()
    for group in np.unique(prefix.numpy()):
        before, after = codes[codes[:, 0] == group, 1], out[codes[:, 0] == group, 1]
        assert np.bincount(after).max() <= -(-len(after) // width), "no code more than its share"
        if len(np.unique(before)) == len(before):
            assert (after == before).all(), "what is told apart stays"


def test_balancing_costs_little_more_than_the_best_assignment_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    points, book = torch.randn(40, 4, generator=generator), torch.randn(64, 4, generator=generator)
    distance = squared_distances(points, book)
    codes = torch.stack([torch.zeros(40, dtype=torch.int64), distance.argmin(1)], 1).numpy()
    out = balance(codes, points, book)
    best = distance.numpy()[linear_sum_assignment(distance.numpy())].sum()
    assert len(np.unique(out[:, 1])) == 40
    assert distance[torch.arange(40), torch.from_numpy(out[:, 1])].sum() < 1.05 * best
    plan = transport(distance[None]).exp()[0]
    assert torch.allclose(plan.sum(1), torch.ones(40), atol=0.05) and float(plan.sum(0).max()) < 1.001


@pytest.fixture
def shared(tmp_path: Path) -> SidTable:
    """Items 0, 2, 3 on one SID; 3 is bought most, 0 and 2 alike."""
    codes = np.array([[1, 0], [0, 1], [1, 0], [1, 0], [2, 1]])
    write_sids(tmp_path / "sids.parquet", codes, levels=2, shared=True)
    return replace(SidTable.read(tmp_path / "sids.parquet"), popularity=np.array([2, 9, 2, 5, 0]))


def test_items_of_one_sid_are_ranked_by_popularity_and_counted(shared: SidTable) -> None:
    assert shared.shared and shared.of_item.tolist() == [0, 1, 0, 0, 2]
    assert shared.distinct.tolist() == [shared.tokens[i].tolist() for i in (0, 1, 4)]
    assert shared.members.tolist() == [[3, 0, 2], [1, -1, -1], [4, -1, -1]]
    assert shared.ranked_items(np.array([[2, 0, -1]]), 6).tolist() == [[4, 3, 0, 2, -1, -1]]
    assert shared.ranked_items(np.array([[0, 1, 2]]), 2).tolist() == [[3, 0]]
    assert shared.tie_facts() == {"shared_sids": 1, "items_with_shared_sid": 3, "items_ranked_by_number": 2}
    unlike = SidTable(shared.tokens[[0, 1, 4]], shared.vocab)
    assert not unlike.shared and unlike.of_item.tolist() == [0, 1, 2] and (unlike.distinct == unlike.tokens).all()


@settings(max_examples=50)
@given(st.integers(2, 30), st.integers(0, 1000))
def test_the_rank_of_codes_is_that_of_their_first_item_among_different_codes(items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = disambiguate(rng.integers(0, 3, (items, 2)))
    table = SidTable(1 + codes + [0, 3, 6], 7 + int(codes[:, -1].max()) + 1)
    order = np.stack([rng.permutation(items)[: items // 2 + 1] for _ in range(4)])
    ranked = np.pad(order, ((0, 0), (0, 1)), constant_values=-1)
    targets = rng.integers(0, items, 4)
    ranks = table.code_ranks(ranked, targets)
    for row, target, rank in zip(order, targets, ranks, strict=True):
        different = list(dict.fromkeys(tuple(codes[item, :2]) for item in row))
        wanted = tuple(codes[target, :2])
        assert rank == (different.index(wanted) + 1 if wanted in different else 0)
        if target in row:
            assert 1 <= rank <= row.tolist().index(target) + 1, "never worse than the item's"
    assert collision_rate(codes) == 0
