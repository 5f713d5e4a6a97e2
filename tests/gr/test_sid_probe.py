"""Linear probes: the ridge against scikit-learn's, no leakage, and what is known to be there or not."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits

from gr.sid import probe
from gr.sid.probe import RIDGE, one_hot, predicted, probe_embedding, probe_factors, r2, ridge


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over such small matrices take longer than the work."""
    with threadpool_limits(1):
        yield


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(0, 1000))
def test_both_ways_to_solve_it_are_ridge_regression(levels: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, targets = one_hot(rng.integers(0, width, (60, levels))), rng.normal(size=(60, 5))
    expected = Ridge(alpha=RIDGE, fit_intercept=False, solver="cholesky").fit(features.toarray(), targets).coef_.T
    assert np.allclose(ridge(features, targets), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "DIRECT", 0)
        patch.setattr(probe, "TARGETS_AT_ONCE", 2)
        assert np.allclose(features @ ridge(features, targets), features @ expected, atol=1e-3)


def test_no_item_is_predicted_by_what_was_fitted_to_it() -> None:
    """Vectors of noise and a code of its own for each item: whatever leaked would be predicted."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 6))
    own, few = np.arange(200)[:, None], rng.integers(0, 4, (200, 2))
    assert all(-0.2 < score <= 0.0 for codes in (own, few) for score in probe_embedding(codes, noise, 0) if score is not None)
    changed = noise.copy()
    changed[7] += 100.0
    before, after = (predicted(one_hot(few), y, 0)[7] for y in (noise, changed))
    assert np.array_equal(before, after)


def test_codes_that_make_the_vector_predict_it_level_by_level() -> None:
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, 4, 2000), rng.integers(0, 4, 2000)], axis=1)
    vectors = 2 * rng.normal(size=(4, 8))[codes[:, 0]] + rng.normal(size=(4, 8))[codes[:, 1]]
    first, both = probe_embedding(codes, vectors, 0)
    coarse = predicted(one_hot(codes[:, :1]), vectors, 0)
    assert first is not None and both is not None
    assert first == pytest.approx(r2(vectors, coarse)) and 0.5 < first < 0.95 and both > 0.999
    assert r2(np.ones((5, 2)), np.ones((5, 2))) is None


def test_known_factors_are_found_where_they_are_and_nowhere_else() -> None:
    rng = np.random.default_rng(0)
    kind, hidden = rng.integers(0, 5, 1000), rng.integers(0, 4, 1000)
    embedding = rng.normal(size=(5, 16))[kind] + 0.1 * rng.normal(size=(1000, 16))
    codes = np.stack([kind // 2, rng.integers(0, 8, 1000)], axis=1)
    found = probe_factors(codes, embedding, {"kind": kind, "hidden": hidden}, 0)
    assert found["kind"]["embedding"] > 0.99
    assert 0.5 < found["kind"]["sid"] < 0.75, "kinds 0 and 1 share a code, and 2 and 3"
    assert all(found["hidden"][source] < found["hidden"]["chance"] + 0.06 for source in ("sid", "embedding"))
