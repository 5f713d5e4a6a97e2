"""Measured coverage of `fit`'s 90% prediction intervals on planted curves.

    python tests/benchmarks/fit_coverage.py [--data-sets 200] [--draws 200]

For each law, design (sizes x seeds) and noise, data sets are planted and fitted with intervals from the seeds; the share of
intervals that hold the true mean is printed for the fitted sizes' middle and largest, with two standard errors.
"""

import argparse

import numpy as np

from fit import fit_law
from fit.tables import Floats

COLUMNS = {"N": "N", "R": "R"}
CURVES = {
    "ceiling": lambda N: 0.1 - 0.06 * (N / 3e5) ** -0.3,
    "log-linear": lambda N: 0.04 + 0.004 * np.log2(N / 3e5),
}


def coverage(law: str, sizes: int, seeds: int, noise: float, data_sets: int, draws: int) -> Floats:
    """Share of 90% intervals that hold the truth at (the middle, the largest) size, (2,)."""
    # A stream for each cell: predictions are nearly linear in the noise, so that with one stream the rows of 1% and 3% would be
    # the same data sets rescaled, and agree to the digit without being two measurements.
    rng = np.random.default_rng([*law.encode(), sizes, seeds, round(1000 * noise)])
    ladder = np.geomspace(3e5, 3e8, sizes)
    N = np.repeat(ladder, seeds)
    at = ladder[[sizes // 2, -1]]
    truth = CURVES[law](at)
    held = np.zeros(2)
    for _ in range(data_sets):
        R = CURVES[law](N) * (1 + noise * rng.normal(size=len(N)))
        table = {"N": N, "R": R, "seed": np.tile(np.arange(seeds), sizes)}
        result = fit_law(table, law, COLUMNS, loss="least-squares", bootstrap=draws, seed=int(rng.integers(2**31)))
        prediction = result.predict({"N": at}, interval=0.9)
        assert prediction.low is not None and prediction.high is not None
        held += (prediction.low <= truth) & (truth <= prediction.high)
    return held / data_sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", type=int, default=200)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 3])
    args = parser.parse_args()
    print(f"{'law':<12}{'sizes x seeds':<16}{'noise':<8}{'middle':<10}{'largest':<10}(nominal 90%)")
    for law in CURVES:
        for sizes, seeds in ((sizes, seeds) for sizes in (6, 10) for seeds in args.seeds):
            for noise in (0.01, 0.03):
                middle, largest = coverage(law, sizes, seeds, noise, args.data_sets, args.draws)
                error = 2 * np.sqrt(0.09 / args.data_sets)
                print(f"{law:<12}{f'{sizes} x {seeds}':<16}{noise:<8.0%}{middle:<10.1%}{largest:<10.1%}± {error:.1%}", flush=True)


if __name__ == "__main__":
    main()
