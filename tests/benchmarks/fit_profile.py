"""Measured coverage of `fit`'s 90% profile likelihood intervals on planted curves.

    python tests/benchmarks/fit_profile.py [--data-sets 20] [--noise .01]

For each law, design (sizes x seeds) and loss, data sets are planted with the noise that the loss is for (of one size for
least squares and `huber`, in proportion to the metric for the logarithmic ones) and fitted; printed is the share of intervals
that hold the truth, for the law's parameters and its mean at the largest size and at four times that, and the share of data sets
with an open end among the parameters.
"""

import argparse
import time

import numpy as np

from fit import fit_law
from fit.tables import Floats

LARGEST = 3e8
CURVES = {
    "ceiling": ({"R0": 0.1, "A": 0.06 * 3e5**0.3, "a": 0.3}, lambda N: 0.1 - 0.06 * (N / 3e5) ** -0.3),
    "log-linear": ({"c": 0.04 - 0.004 * np.log2(3e5), "g": 0.004}, lambda N: 0.04 + 0.004 * np.log2(N / 3e5)),
}
LOSSES = {
    "least-squares": ("least-squares", None, "constant"),
    "least-squares, wrong noise": ("least-squares", None, "proportional"),
    "log-huber, delta 1": ("log-huber", 1.0, "proportional"),
    "log-huber": ("log-huber", None, "proportional"),
    "l1": ("l1", None, "proportional"),
}


def coverage(law: str, loss: str, sizes: int, seeds: int, noise: float, data_sets: int) -> tuple[Floats, float]:
    """Share of 90% intervals that hold the truth, of each parameter and of the mean at the largest size and four times it; and
    the share of data sets where a parameter's interval is open."""
    truth, curve = CURVES[law]
    name, delta, kind = LOSSES[loss]
    rng = np.random.default_rng([*law.encode(), *loss.encode(), sizes, seeds])
    N = np.repeat(np.geomspace(3e5, LARGEST, sizes), seeds)
    asked = [*truth.items(), *(({"N": n}, curve(n)) for n in (LARGEST, 4 * LARGEST))]
    held, open_ = np.zeros(len(asked)), 0
    for _ in range(data_sets):
        R = curve(N) + noise * (curve(N) if kind == "proportional" else curve(N).mean()) * rng.normal(size=len(N))
        result = fit_law({"N": N, "R": R}, law, {"N": "N", "R": "R"}, loss=name, delta=delta)
        found = [result.profile(what, level=0.9) for what, _ in asked]
        held += [interval.low <= true <= interval.high for interval, (_, true) in zip(found, asked, strict=True)]
        open_ += any(interval.warnings for interval in found[: len(truth)])
    return held / data_sets, open_ / data_sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--losses", nargs="*", default=list(LOSSES)[:-1])
    args = parser.parse_args()
    print(f"nominal 90%, two standard errors {2 * np.sqrt(0.09 / args.data_sets):.1%}; {args.noise:.0%} noise")
    for law, (truth, _) in CURVES.items():
        print(f"\n{law:<28}{'sizes x seeds':<15}" + "".join(f"{name:<8}" for name in (*truth, "largest", "4x")) + "open    s")
        for loss in args.losses:
            for sizes in (6, 10):
                began = time.perf_counter()
                shares, open_ = coverage(law, loss, sizes, 3, args.noise, args.data_sets)
                seconds = (time.perf_counter() - began) / args.data_sets
                cells = "".join(f"{share:<8.1%}" for share in (*shares, open_))
                print(f"{loss:<28}{f'{sizes} x 3':<15}{cells}{seconds:.2f}", flush=True)


if __name__ == "__main__":
    main()
