"""Quantizers, the disambiguating digit, and the table of SIDs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.errors import UserError
from gr.sid.kmeans import kmeans
from gr.sid.quantizers import assign, residual_kmeans, rqvae, standardize
from gr.sid.sids import SidTable, disambiguate, sid_facts, write_sids


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
