"""How often `compare_laws` finds a floor, a break or a second term, where there is one and where there is none.

    python tests/benchmarks/fit_compare.py [--data-sets 200] [--draws 99] [--only hinge]

Six sizes, two runs each, for each nested pair: the share of data sets with p at most .05 by the parametric bootstrap, and by
chi-square with the difference in parameters as its degrees of freedom, under the smaller law and under the larger.
"""

import argparse

import numpy as np
from scipy.special import chdtrc

from fit.compare import compare_laws
from fit.laws import LAWS

N = np.repeat(np.geomspace(3e5, 3e8, 6), 2)
D = np.tile(np.geomspace(1e8, 1e11, 4), 3)
LOG = np.log2(N / 3e5)
PAIRS = {
    "power-floor": ("power", "log", 0.01, 5 * 2 ** (-0.1 * LOG), 1 + 4 * 2 ** (-0.13 * LOG), {"N": "N", "L": "y"}),
    "hinge": ("log-linear", "linear", 4e-4, 0.02 + 4e-3 * LOG, 0.02 + 4e-3 * np.minimum(LOG, 9.0), {"N": "N", "R": "y"}),
    "broken": (
        "power-floor",
        "log",
        0.01,
        1.5 + 2 * 2 ** (-0.3 * LOG),
        1.5 + 2 * 2 ** (-0.05 * LOG) / (1 + (N / 1e7) ** 4) ** 0.1,
        {"N": "N", "L": "y"},
    ),
    "two-term": (
        "ceiling",
        "linear",
        1e-3,
        0.1 - 0.06 * 2 ** (-0.4 * LOG),
        0.1 - 0.06 * 2 ** (-0.4 * LOG) - 4e-3 * (D / 1e8) ** -0.3,
        {"N": "N", "N_SI": "N", "N_CF": "D", "R": "y"},
    ),
}


def shares(large: str, data_sets: int, draws: int) -> list[float]:
    """By the bootstrap and by chi-square, under the smaller law, then under the larger."""
    small, scale, sd, null, other, columns = PAIRS[large]
    spare = len(LAWS[large].params) - len(LAWS[small].params)
    out = []
    for mean in (null, other):
        rng = np.random.default_rng([*large.encode(), mean is null])
        found = []
        for seed in range(data_sets):
            luck = sd * rng.normal(size=len(N))
            y = mean * np.exp(luck) if scale == "log" else mean + luck
            table = {"N": N, "D": D, "y": y}
            test = compare_laws(table, [small, large], columns, scale=scale, bootstrap=draws, seed=seed).tests[0]
            found.append((test.p <= 0.05, chdtrc(spare, test.statistic) <= 0.05))
        out += [float(share) for share in np.mean(found, axis=0)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", type=int, default=200)
    parser.add_argument("--draws", type=int, default=99)
    parser.add_argument("--only", choices=PAIRS)
    args = parser.parse_args()
    print(f"{args.data_sets} data sets, {args.draws} draws; share of p <= .05 (nominal .05 under the smaller law)")
    print(f"{'pair':<26}{'none there':>12}{'chi-square':>12}{'one there':>12}{'chi-square':>12}")
    for large in [args.only] if args.only else PAIRS:
        row = "".join(f"{share:>12.3f}" for share in shares(large, args.data_sets, args.draws))
        print(f"{PAIRS[large][0] + ' / ' + large:<26}{row}", flush=True)


if __name__ == "__main__":
    main()
