"""Time of `fit` on one core, beside scipy's own `least_squares` from many starts in the same minute.

    python tests/benchmarks/fit_speed.py [--draws 4000]

The table is planted like the Chinchilla replication's: 240 runs, E + A/N^a + B/D^b, Huber with delta 1e-3 on log residuals.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product

import numpy as np
from scipy.optimize import least_squares
from threadpoolctl import threadpool_limits

from fit import fit_law
from fit.tables import Floats

COLUMNS = {"N": "N", "D": "D", "L": "L"}


def planted(rows: int, seed: int = 0) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    N, C = np.exp(rng.uniform(np.log(5e7), np.log(1.5e10), rows)), np.exp(rng.uniform(np.log(1e19), np.log(3e21), rows))
    D = C / 6 / N
    L = (1.817 + 478 / N**0.3473 + 2143 / D**0.3672) * np.exp(0.004 * rng.standard_t(3, size=rows))
    return {"N": N, "D": D, "L": L}


def seconds(work: Callable[[], object]) -> float:
    """Processor time of this process, the least of three."""
    took = []
    for _ in range(3):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return min(took)


def scipys(table: dict[str, Floats], starts: int) -> float:
    """The least objective of `least_squares`, Huber on log residuals, from a grid of starts over (a, b, E, A, B)."""
    x, z, y = np.log(table["N"]), np.log(table["D"]), np.log(table["L"])

    def residuals(p: Floats) -> Floats:
        a, b, e, la, lb = p
        return np.logaddexp(np.logaddexp(la - a * x, lb - b * z), e) - y

    grid = list(product((0.1, 0.3, 0.6), (0.1, 0.3, 0.6), (-0.5, 0.5), (3.0, 8.0), (3.0, 8.0)))[:starts]
    return min(least_squares(residuals, p, loss="huber", f_scale=1e-3).cost for p in grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    args = parser.parse_args()
    threadpool_limits(1)
    table = planted(240)
    fit_law(table, "chinchilla", COLUMNS)  # loads what is loaded late
    point = seconds(lambda: fit_law(table, "chinchilla", COLUMNS))
    began = time.process_time()
    theirs = scipys(table, 72)
    scipy_time = time.process_time() - began
    ours = fit_law(table, "chinchilla", COLUMNS).objective
    print(f"point fit, 240 rows, 5 parameters: {point:.3f} s, objective {ours:.7e}")
    print(
        f"scipy least_squares, 72 starts:    {scipy_time:.3f} s, objective {theirs:.7e} ({scipy_time / point:.0f} times as long)"
    )
    began = time.process_time()
    fit_law(table, "chinchilla", COLUMNS, bootstrap=args.draws)
    print(f"{args.draws} bootstraps of it:           {time.process_time() - began:.2f} s")
    print("\nrows      draws   seconds   microseconds per row and draw")
    for rows, draws in ((240, 500), (240, 1000), (240, 2000), (2400, 200), (24_000, 20), (100_000, 5)):
        table = planted(rows)
        alone = seconds(lambda table=table: fit_law(table, "chinchilla", COLUMNS))  # type: ignore[misc]
        began = time.process_time()
        fit_law(table, "chinchilla", COLUMNS, bootstrap=draws)
        took = time.process_time() - began - alone
        print(f"{rows:<10}{draws:<8}{took:<10.2f}{1e6 * took / rows / draws:.2f}   (point fit {alone:.2f} s)", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import fit"], check=True)
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    print(f"\nimport fit: {bare - began - (time.perf_counter() - bare):.3f} s")


if __name__ == "__main__":
    main()
