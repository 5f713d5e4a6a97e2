"""Measured coverage of `fit`'s intervals, nominal 90%, on planted curves.

    python tests/benchmarks/fit_coverage.py [--data-sets 1000] [--draws 300] [--law ceiling] [--design 6x3] [--loss log-huber]

For each law, design (sizes x seeds) and noise (per run, growing with the metric to the power --power, by default in proportion),
data sets are planted and fitted with intervals from the seeds. Printed are the shares of intervals that hold the truth: each
parameter; the mean at the middle and the largest fitted size and at 4 times the largest; a new run at the largest and at 4 times
it. For a new run it is the mean chance that the interval holds one. Then the median width of the interval of the mean at the
largest size, relative to the mean. The chinchilla law has three token budgets for each size. A row of 1000
data sets takes about a minute of one core.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from fit import fit_law
from fit.laws import LAWS
from fit.tables import Floats
from fit.uncertainty import ends

LEVEL = 0.9
TRUTHS: dict[str, dict[str, float]] = {
    "ceiling": {"R0": 0.1, "A": 0.06 * 3e5**0.3, "a": 0.3},
    "log-linear": {"c": 0.04 - 0.004 * float(np.log2(3e5)), "g": 0.004},
    "power-floor": {"E": 1.8, "A": 2.0 * 3e5**0.35, "a": 0.35},
    "chinchilla": {"E": 1.8, "A": 1.0 * 3e5**0.35, "B": 1.0 * 6e6**0.37, "a": 0.35, "b": 0.37},
}


@dataclass(frozen=True)
class Cell:
    """What was measured: shares of the data sets, and ``width`` of the mean's interval at the largest size over the mean."""

    params: dict[str, float]
    mean: Floats
    """(3,): at the middle size, at the largest, at 4 times the largest."""
    new_run: Floats
    """(2,): at the largest size, at 4 times the largest."""
    width: float


def design(law: str, sizes: int, seeds: int) -> tuple[dict[str, Floats], NDArray[np.intp], dict[str, Floats]]:
    """Sizes and seed of each row, and the sizes at which to predict."""
    ladder = np.geomspace(3e5, 3e8, sizes)
    ahead = np.array([ladder[sizes // 2], ladder[-1], 4 * ladder[-1]])
    if law != "chinchilla":
        return {"N": np.repeat(ladder, seeds)}, np.tile(np.arange(seeds), sizes), {"N": ahead}
    N, D = (grid.ravel() for grid in np.meshgrid(ladder, np.geomspace(6e6, 6e9, 3)))
    rows = {"N": np.repeat(N, seeds), "D": np.repeat(D, seeds)}
    return rows, np.tile(np.arange(seeds), len(N)), {"N": ahead, "D": np.array([6e9 / 1e3**0.5, 6e9, 4 * 6e9])}


def curve(law: str, sizes: Mapping[str, Floats]) -> Floats:
    p = TRUTHS[law]
    if law == "log-linear":
        return p["c"] + p["g"] * np.log2(sizes["N"])
    if law == "ceiling":
        return np.asarray(p["R0"] - p["A"] / sizes["N"] ** p["a"])
    value = p["E"] + p["A"] / sizes["N"] ** p["a"]
    return np.asarray(value + p["B"] / sizes["D"] ** p["b"] if law == "chinchilla" else value)


def coverage(law: str, sizes: int, seeds: int, noise: float, data_sets: int, draws: int, loss: str, power: float) -> Cell:
    # A stream for each cell: predictions are nearly linear in the noise, so that with one stream the rows of 1% and 3% would be
    # the same data sets rescaled, and agree to the digit without being two measurements.
    rng = np.random.default_rng([*law.encode(), sizes, seeds, round(1000 * noise)])
    rows, seed, ahead = design(law, sizes, seeds)
    mean, truth = curve(law, rows), curve(law, ahead)
    scale = noise * mean.mean() ** (1 - power)
    sd, luck = scale * mean**power, scale * truth**power
    planted = np.array([TRUTHS[law][name] for name in LAWS[law].params])
    response = LAWS[law].response
    params, held, run, widths = np.zeros(len(planted)), np.zeros(3), np.zeros(3), []
    for _ in range(data_sets):
        table = {**rows, response: mean + sd * rng.normal(size=len(mean)), "seed": seed}
        columns = {role: role for role in (*rows, response)}
        result = fit_law(table, law, columns, loss=loss, bootstrap=draws, seed=int(rng.integers(2**31)))
        low, high = ends(result.draws, LEVEL, result.bootstrap["dof"])
        params += (low <= planted) & (planted <= high)
        of_mean, of_run = (result.predict(ahead, interval=LEVEL, new_run=new) for new in (False, True))
        assert of_mean.low is not None and of_mean.high is not None and of_run.low is not None and of_run.high is not None
        held += (of_mean.low <= truth) & (truth <= of_mean.high)
        run += ndtr((of_run.high - truth) / luck) - ndtr((of_run.low - truth) / luck)
        widths.append((of_mean.high[1] - of_mean.low[1]) / truth[1])
    shares = dict(zip(LAWS[law].params, map(float, params / data_sets), strict=True))
    return Cell(shares, held / data_sets, run[1:] / data_sets, float(np.median(widths)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--law", nargs="*", choices=TRUTHS, default=list(TRUTHS))
    parser.add_argument(
        "--design", nargs="*", help="sizes x seeds; by default 6x1 6x3 10x1 10x3, for power-floor and chinchilla 6x3"
    )
    parser.add_argument("--noise", type=float, nargs="*", default=[0.01, 0.03])
    parser.add_argument("--loss", default="least-squares")
    parser.add_argument("--power", type=float, default=1.0)
    args = parser.parse_args()
    error = 100 * np.sqrt(LEVEL * (1 - LEVEL) / args.data_sets)
    print(f"shares in %, standard error {error:.1f}; loss {args.loss}, noise ~ metric^{args.power:g}")
    print("| law | sizes x seeds | noise | middle | largest | 4 x largest | new run: largest | 4 x | parameters | width |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for law in args.law:
        designs = args.design or (["6x1", "6x3", "10x1", "10x3"] if law in ("ceiling", "log-linear") else ["6x3"])
        for sizes, seeds in (map(int, name.split("x")) for name in designs):
            for noise in args.noise:
                cell = coverage(law, sizes, seeds, noise, args.data_sets, args.draws, args.loss, args.power)
                shares = " | ".join(f"{100 * s:.1f}" for s in (*cell.mean, *cell.new_run))
                params = ", ".join(f"{name} {100 * s:.1f}" for name, s in cell.params.items())
                print(f"| {law} | {sizes} x {seeds} | {noise:.0%} | {shares} | {params} | {cell.width:.2%} |", flush=True)


if __name__ == "__main__":
    main()
