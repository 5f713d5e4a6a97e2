"""Where searches start: the same for a table by itself and in a batch."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from fit.laws import LAWS
from fit.problem import LOSSES, Problem
from fit.starts import bounded_least_squares, starts, table_starts


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("weighted", [False, True])
def test_each_table_of_a_batch_starts_where_it_would_alone(loss, weighted):
    rng, N = np.random.default_rng(0), np.geomspace(1e6, 1e9, 9)
    y = (1.0 - 0.6 * (N / 1e6) ** -0.35) * (1 + 0.02 * rng.normal(size=(7, 9)))
    weights = rng.integers(1, 4, (7, 9)).astype(float) if weighted else np.ones((1, 9))
    delta = 1e-3 if "huber" in loss else np.inf
    problem = Problem(LAWS["ceiling"], {"N": np.log(N)}, y, weights, loss, delta)
    found = table_starts(problem)
    for t in range(7):
        alone = replace(problem, y=y[t : t + 1], weights=weights[t : t + 1] if weighted else weights)
        assert found[t] == pytest.approx(starts(alone, 1)[0], rel=1e-9)


def test_bounded_least_squares_is_exact_for_every_point_and_table():
    rng = np.random.default_rng(1)
    basis, y, weights = rng.normal(size=(5, 12, 3)), rng.normal(size=(4, 1, 12)), rng.uniform(0.5, 2.0, (4, 5, 12))
    lower, upper = np.array([0.0, -np.inf, -0.1]), np.array([np.inf, np.inf, 0.1])
    c = bounded_least_squares(basis, y, weights, lower, upper)
    assert c.shape == (4, 5, 3) and np.any(c[..., 0] == 0.0) and np.any(c[..., 0] > 0.0)
    for t in range(4):
        for g in range(5):
            root = np.sqrt(weights[t, g])
            expected = lsq_linear(basis[g] * root[:, None], y[t, 0] * root, (lower, upper), method="bvls").x
            assert c[t, g] == pytest.approx(expected, abs=1e-8)
