"""What a sweep of the learning rate is for: with one rate a ladder bends that does not bend with each rung's own."""

from pathlib import Path

import pytest

from tests.benchmarks.tuned_ladder import RATES, compare


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_ladder_of_one_rate_bends_and_the_tuned_one_does_not(tmp_path: Path) -> None:
    fixed, tuned = compare(tmp_path)
    assert tuned.rates == sorted(tuned.rates, reverse=True), "the best rate falls with the width"
    assert RATES[0] < tuned.rates[0] < RATES[-1], "the kept rate is the smallest rung's best, and no edge of the list"
    assert fixed.rates == [tuned.rates[0]] * len(fixed.rates)
    assert fixed.losses[0] == tuned.losses[0], "the smallest rung is the same in both"
    assert fixed.last_step.low > 0 and fixed.last_step.mean > 0.1, "the largest rung is worse than the next: the ladder bends"
    assert tuned.last_step.high < 0 and tuned.last_step.mean < -0.03, "the largest rung is better than the next"
