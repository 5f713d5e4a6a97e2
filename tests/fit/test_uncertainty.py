"""What the data tell of a run's noise, and the draws made with it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import null_space

from fit import fit_law
from fit.laws import LAWS
from fit.problem import Problem, jacobian
from fit.solve import solve
from fit.uncertainty import Design, _residuals, ends, resample, run_spread, tail

LADDER = np.geomspace(3e5, 3e8, 10)
COLUMNS = {"N": "N", "R": "R"}


def planted(seeds: int, sd: float, power: float = 1.0, ladder: np.ndarray = LADDER, seed: int = 0) -> dict[str, np.ndarray]:
    """A ceiling from .04 to .09, whose noise is ``sd`` where the metric is .1, and grows with its power."""
    N = np.repeat(ladder, seeds)
    mean = 0.1 - 0.06 * (N / 3e5) ** -0.3
    noise = sd * (mean / 0.1) ** power * np.random.default_rng(seed).normal(size=len(N))
    return {"N": N, "R": mean + noise, "seed": np.tile(np.arange(seeds), len(ladder))}


def fitted(table, loss="least-squares", law="ceiling"):
    scale, delta = float(np.median(table["R"])), 1e-3 if loss == "log-huber" else np.inf
    ones = np.ones((1, len(table["N"])))
    problem = Problem(LAWS[law], {"N": np.log(table["N"])}, table["R"][None] / scale, ones, loss, delta, scale)
    rung = np.unique(table["N"], return_inverse=True)[1]
    return problem, solve(problem).p, Design(rung, table["seed"])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss", ["least-squares", "log-huber"])
@pytest.mark.parametrize("method", ["seeds", "residuals"])
def test_the_power_of_noise_is_learnt_where_runs_are_many(power, loss, method):
    """In log residuals noise in proportion is constant: powers are one less there. The standard error is .1 at 390 dof."""
    problem, p, design = fitted(planted(40, 0.001, power), loss)
    spread = run_spread(problem, p, design, method)
    mean = float(spread.shares @ spread.powers) + (1.0 if loss == "log-huber" else 0.0)
    assert mean == pytest.approx(power, abs=0.3)
    assert spread.dof == (390 if method == "seeds" else 397)


def test_three_runs_a_size_leave_the_power_open():
    """Averaged over data sets the powers' mean is the true one: no edge of the prior draws it inwards."""
    found = []
    for seed in range(60):
        problem, p, design = fitted(planted(3, 0.001, 1.0, LADDER[::2], seed))
        spread = run_spread(problem, p, design, "seeds")
        found.append(spread.shares @ spread.powers)
        assert spread.shares.max() < 0.9
    assert np.mean(found) == pytest.approx(1.0, abs=0.25)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), unit=st.floats(1e-3, 1e3), power=st.floats(0, 1))
def test_the_metrics_unit_does_not_matter(seed, unit, power):
    table = planted(3, 0.001, power, seed=seed)
    one, other = (fit_law({**table, "R": table["R"] * by}, "ceiling", COLUMNS, loss="least-squares").spread for by in (1.0, unit))
    assert other.shares == pytest.approx(one.shares, abs=1e-4)
    assert other.sd == pytest.approx(one.sd * unit, rel=1e-4) and other.at == pytest.approx(one.at * unit, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.floats(-1, 2))
def test_the_restricted_likelihood_is_that_of_error_contrasts(seed, power):
    """Harville 1974: the normal likelihood of Q'r, Q any basis of what the law's linearisation leaves."""
    problem, p, _ = fitted(planted(1, 0.002, seed=seed))
    seen = _residuals(problem, p)
    Q = null_space(jacobian(problem, p[None])[0])
    metric = problem.fitted(p[None])[0]

    def contrasts(unit):
        V = (Q * (unit**2)[:, None]).T @ Q
        e = Q.T @ seen.deviations
        return float(e @ np.linalg.solve(V, e)), np.linalg.slogdet(V)[1] / 2

    flat, bent = np.ones(len(metric)), (metric / metric.mean()) ** power
    assert seen.fit(bent)[0] == pytest.approx(contrasts(bent)[0], rel=1e-6)
    assert seen.fit(bent)[1] - seen.fit(flat)[1] == pytest.approx(contrasts(bent)[1] - contrasts(flat)[1], abs=1e-8)


def test_constant_noise_has_the_textbook_variance():
    """At power 0: of replicates pooled, and of residuals RSS / (rows - parameters)."""
    problem, p, design = fitted(planted(3, 0.001, 0.0))
    by_size = problem.y[0].reshape(10, 3)
    replicates, residuals = (run_spread(problem, p, design, method) for method in ("seeds", "residuals"))
    flat = int(np.argmin(np.abs(replicates.powers)))
    assert replicates.sd[flat] ** 2 == pytest.approx(np.mean(np.var(by_size, axis=1, ddof=1)), rel=1e-9)
    assert residuals.sd[flat] ** 2 == pytest.approx(np.sum(problem.residuals(p[None]) ** 2) / 27, rel=1e-6)


@pytest.mark.parametrize("loss", ["least-squares", "log-huber", "huber", "l1"])
def test_draws_are_about_the_fit_whatever_the_loss(loss):
    """L1 fits the middle run of each size, not the mean; draws about the means would be of a curve that is not reported."""
    result = fit_law(planted(3, 0.002), "ceiling", COLUMNS, loss=loss, bootstrap=100)
    curves = result.curves({"N": np.log(LADDER[[0, 5, 9]])})
    spread = curves[1:].std(axis=0)
    assert np.median(curves[1:], axis=0) == pytest.approx(curves[0], abs=0.4 * float(spread.max()))


def test_the_same_seed_gives_the_same_intervals():
    one, again, other = (
        fit_law(planted(3, 0.002), "ceiling", COLUMNS, loss="least-squares", bootstrap=30, seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(one.draws, again.draws) and not np.array_equal(one.draws, other.draws)
    ends = [result.predict({"N": LADDER}, new_run=True).high for result in (one, again)]
    assert np.array_equal(*ends)


def test_a_draw_has_the_replicates_noise_at_each_size():
    """Proportional noise, with so many runs that it is known: so are the drawn tables', at every size, whoever draws them."""
    problem, p, design = fitted(planted(60, 0.005))
    for method in ("seeds", "residuals", "parametric"):
        drawn = resample(problem, p, design, method, 50, seed=2).y / problem.fitted(p[None])[0] - 1
        assert drawn.reshape(50, 10, 60).std(axis=(0, 2)) == pytest.approx(np.full(10, 0.05), rel=0.12)


def test_a_new_run_has_the_noise_of_its_size():
    """Noise of 3% of the metric, which is 2.3 times as large at the top as at the bottom."""
    result = fit_law(planted(60, 0.003), "ceiling", COLUMNS, loss="least-squares", bootstrap=400)
    run = result.predict({"N": LADDER[[0, 9]]}, new_run=True)
    assert (run.high - run.low)[1] / (run.high - run.low)[0] == pytest.approx(0.0925 / 0.04, rel=0.2)
    assert run.high - run.low == pytest.approx(2 * 1.65 * 0.03 * run.value, rel=0.15)


def test_a_metric_through_zero_has_constant_noise():
    N = np.repeat(LADDER, 3)
    R = 0.004 * (np.log2(N) - np.log2(N).mean()) + 0.001 * np.random.default_rng(0).normal(size=30)
    table = {"N": N, "R": R, "seed": np.tile([0, 1, 2], 10)}
    result = fit_law(table, "log-linear", COLUMNS, loss="least-squares", bootstrap=50)
    assert list(result.spread.powers) == [0.0] and result.spread.sd[0] == pytest.approx(result.noise[0])
    assert np.isfinite(result.predict({"N": LADDER}, new_run=True).high).all()


@pytest.mark.parametrize("loss", ["least-squares", "log-huber"])
def test_replicates_of_one_size_tell_no_power(loss):
    once, more = planted(1, 0.001), planted(4, 0.001)
    kept = more["N"] == LADDER[0]
    table = {name: np.concatenate([once[name][1:], more[name][kept]]) for name in once}
    problem, p, design = fitted(table, loss)
    spread = run_spread(problem, p, design, "seeds")
    assert list(spread.powers) == [0.0] and spread.dof == 3


def test_seeds_that_agree_to_the_digit_draw_the_fit_itself():
    table = planted(3, 0.0)
    result = fit_law(table, "ceiling", COLUMNS, loss="least-squares", bootstrap=20)
    assert result.predict({"N": LADDER}).low == pytest.approx(0.1 - 0.06 * (LADDER / 3e5) ** -0.3, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "power"), [("ceiling", 1.0), ("ceiling", 0.0), ("log-linear", 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(law, power):
    """Six sizes, three seeds, 3%: 90% intervals of the mean and of a new run, beyond the largest size too. 3 standard errors of
    250 data sets are 5.7%."""
    from tests.benchmarks.fit_coverage import coverage

    cell = coverage(law, 6, 3, 0.03, data_sets=250, draws=150, loss="least-squares", power=power)
    assert cell.mean == pytest.approx(0.9, abs=0.06)
    assert cell.new_run == pytest.approx(0.9, abs=0.05)


@settings(max_examples=20, deadline=None)
@given(draws=st.integers(9, 60), order=st.randoms(use_true_random=False))
def test_an_interval_of_few_draws_ends_at_their_order_statistics(draws, order):
    """Of B draws and the truth, all from one distribution, the truth is below the k-th with probability k/(B + 1)."""
    values = [float(v) for v in range(1, draws + 1)]
    order.shuffle(values)
    low, high = ends(np.array(values)[:, None], 1 - 4 / (draws + 1), None)
    assert (low[0], high[0]) == (pytest.approx(2.0), pytest.approx(draws - 1.0))


def test_few_replicates_widen_as_students_t_does():
    assert tail(0.9, 3) < tail(0.9, 12) < tail(0.9, None)
