"""The paired bootstrap against the textbook's normal interval, and how often it is wrong."""

import numpy as np
import pytest

from fit import FitError
from fit.paired import paired_difference


def test_the_interval_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    shared = rng.random(4000) < 0.5  # users that both systems hit: no part of the difference's noise
    one, other = (shared | (rng.random(4000) < p) for p in (0.20, 0.15))
    found = paired_difference(one.astype(float), other.astype(float))
    difference = one.astype(float) - other
    half = 1.96 * difference.std() / np.sqrt(4000)
    assert found.mean == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.1 * half)
    assert found == paired_difference(one.astype(float), other.astype(float))


def test_the_difference_turns_with_its_sides():
    one, other = np.array([1.0, 1, 1, 0, 1] * 50), np.array([0.0, 1, 0, 0, 0] * 50)
    forth, back = paired_difference(one, other), paired_difference(other, one)
    assert forth.told_apart and back.told_apart and forth.low > 0 > back.high


def test_equal_systems_are_told_apart_at_the_level():
    rng = np.random.default_rng(1)
    wrong = [paired_difference(*(rng.random((2, 500)) < 0.2).astype(float), draws=400).told_apart for _ in range(400)]
    assert 0.01 <= np.mean(wrong) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_values_that_do_not_pair():
    for one, other in ((np.zeros(3), np.zeros(2)), (np.zeros(0), np.zeros(0))):
        with pytest.raises(FitError, match="one user at least"):
            paired_difference(one, other)
