"""How often `fit.saturation` is right on planted curves, beside what three common readings of the same points would have said.

    python tests/benchmarks/fit_saturation.py [--data-sets 1000] [--seeds 3] [--noise 0.011] [--law-data-sets 100]

Every curve is planted at the ten recommender sizes of Liu et al. 2025 (table 2). "AICc", "last two" and "p > .05" say *saturated*
where AICc prefers the ceiling law to the log-linear one, where the last two sizes' means differ by less than d per doubling, and
where the slope over the same largest sizes is not significant at 5%. d is the worthwhile gain, 1% of the top sizes' mean.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from fit import Saturation, fit_law, holm, saturation, saturation_size
from fit.tables import Floats

Curve = Callable[[Floats], Floats]
SIZES = np.array([0.336e6, 0.778e6, 1.9e6, 3.3e6, 6.7e6, 13e6, 21e6, 43e6, 88e6, 192e6])
COLUMNS = {"N": "N", "R": "R"}
D = 0.01
TOP = 4
CLAIMS = ("saturated", "still scaling", "degrading", "never scaled", "inconclusive")


def line(relative: float) -> Curve:
    """Log-linear, gaining ``relative`` of its own mean over the top sizes per doubling."""
    centre = np.log2(SIZES[-TOP:]).mean()
    return lambda N: 0.04 * (1 + relative * (np.log2(N) - centre))


def ceiling(relative: float, a: float) -> Curve:
    """R0 - A/N^a whose least-squares slope over the top sizes is ``relative`` of their mean."""
    x, shape = np.log2(SIZES[-TOP:]), (SIZES[-TOP:] / SIZES[0]) ** -a
    slope = -np.polyfit(x, shape, 1)[0]
    A = relative / (slope + relative * shape.mean())
    return lambda N: 0.045 * (1 - A * (N / SIZES[0]) ** -a)


def hinge(relative: float, flat_from: float) -> Curve:
    return lambda N: line(relative)(np.minimum(N, flat_from))


@dataclass(frozen=True)
class Case:
    name: str
    curve: Curve
    claim: str
    target: str = ""


def cases() -> list[Case]:
    """``claim`` is the verdict whose share ``target`` (of the issue) is about."""
    return [
        Case("log-linear, slope d", line(D), "saturated", "<= .05 + 2 SE"),
        Case("log-linear, slope 1.5 d", line(1.5 * D), "saturated", "<= .01"),
        Case("log-linear, slope 3 d", line(3 * D), "still scaling"),
        Case("ceiling, slope .12 d, a .6", ceiling(0.12 * D, 0.6), "saturated", ">= .80"),
        Case("ceiling, slope .12 d, a .3", ceiling(0.12 * D, 0.3), "saturated"),
        Case("SID paper, Beauty (.35 d)", lambda N: 0.04529 - 16.8 * N**-0.6, "saturated"),
        Case("hinge, flat beyond 13M", hinge(0.05, 13e6), "saturated", ">= .90"),
        Case("degrading, slope -1.5 d", line(-1.5 * D), "degrading"),
        Case("flat everywhere", lambda N: np.full_like(N, 0.04), "never scaled"),
    ]


def planted(curve: Curve, seeds: int, noise: float, count: int, rng: np.random.Generator, sizes: Floats = SIZES) -> Floats:
    """(count, sizes, seeds)."""
    mean = curve(sizes)[None, :, None]
    return np.asarray(mean * (1 + noise * rng.normal(size=(count, len(sizes), seeds))))


def judge(R: Floats) -> Saturation:
    return saturation({"N": np.repeat(SIZES, R.shape[1]), "R": R.ravel()}, COLUMNS, worthwhile=D)


def by_aicc(R: Floats) -> Floats:
    """(count,): whether AICc prefers ceiling to log-linear; the ceiling's exponent from a fine grid, its coefficient >= 0."""
    y = R.reshape(len(R), -1)
    y, n = y - y.mean(axis=1, keepdims=True), y.shape[1]
    N = np.repeat(SIZES / SIZES[0], R.shape[2])
    total = np.sum(y**2, axis=1)

    def unit(shape: Floats) -> Floats:
        centred = shape - shape.mean(axis=-1, keepdims=True)
        return np.asarray(centred / np.linalg.norm(centred, axis=-1, keepdims=True))

    exponents = np.geomspace(0.01, 5, 400)[:, None]
    gained = np.max(np.maximum(y @ unit(-(N**-exponents)).T, 0) ** 2, axis=1)
    aicc = [
        n * np.log(sse / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        for sse, k in ((total - gained, 4), (total - (y @ unit(np.log(N))) ** 2, 3))
    ]
    return np.asarray(aicc[0] < aicc[1])


def by_last_two(R: Floats) -> Floats:
    means = R.mean(axis=2)
    gain = (means[:, -1] - means[:, -2]) / np.log2(SIZES[-1] / SIZES[-2])
    return np.asarray(gain < D * means[:, -TOP:].mean(axis=1))


def by_no_significance(R: Floats) -> Floats:
    y = R[:, -TOP:].reshape(len(R), -1)
    x = np.repeat(np.log2(SIZES[-TOP:]), R.shape[2])
    x, y, dof = x - x.mean(), y - y.mean(axis=1, keepdims=True), y.shape[1] - 2
    slope = y @ x / (x @ x)
    error = np.sqrt(np.sum((y - slope[:, None] * x) ** 2, axis=1) / dof / (x @ x))
    return np.asarray(2 * stdtr(dof, -np.abs(slope / error)) > 0.05)


def met(case: Case, share: float, count: int) -> str:
    if not case.target:
        return ""
    sign, bound = case.target.split()[:2]
    limit = float(bound) + (2 * np.sqrt(0.05 * 0.95 / count) if "SE" in case.target else 0.0)
    good = share <= limit if sign == "<=" else share >= limit
    return f"{case.claim} {case.target}: {'met' if good else 'NOT MET'}"


def verdicts(args: argparse.Namespace) -> None:
    print(f"Shares of {args.data_sets} data sets, {args.seeds} seeds, noise {args.noise:.1%}; d is {D:.0%} per doubling")
    names = ("saturated", "scaling", "degrading", "never", "inconcl.")
    print(f"{'':28}{'fit.saturation':<50}'saturated' by\n{'curve':<28}", end="")
    print("".join(f"{n:<10}" for n in names) + f"{'AICc':<8}{'last two':<10}{'p > .05':<9}target")
    for i, case in enumerate(cases()):
        R = planted(case.curve, args.seeds, args.noise, args.data_sets, np.random.default_rng([i, args.seeds]))
        found = [judge(r).verdict for r in R]
        share = [found.count(claim) / len(found) for claim in CLAIMS]
        others = [rule(R).mean() for rule in (by_aicc, by_last_two, by_no_significance)]
        print(f"{case.name:<28}" + "".join(f"{s:<10.3f}" for s in share), end="")
        print(f"{others[0]:<8.3f}{others[1]:<10.3f}{others[2]:<9.3f}", end="")
        print(met(case, share[CLAIMS.index(case.claim)], len(found)), flush=True)


def families(args: argparse.Namespace) -> None:
    """Four curves judged together, all at the boundary, where every claim is wrong."""
    rng, count = np.random.default_rng(100), max(args.data_sets // 2, 1)
    R = planted(line(D), args.seeds, args.noise, 4 * count, rng)
    alone, together = np.zeros(2), np.zeros(2)
    for i in range(count):
        curves = [judge(r) for r in R[4 * i : 4 * i + 4]]
        for wrong, found in ((alone, curves), (together, holm(curves))):
            wrong += [any(s.verdict == claim for s in found) for claim in CLAIMS[:2]]
    print(f"\nFour log-linear curves of slope d, {count} families: share with any false claim")
    for name, wrong in (("each alone", alone), ("holm", together)):
        print(f"  {name:<12}saturated {wrong[0] / count:.3f}   still scaling {wrong[1] / count:.3f}")


def plans(args: argparse.Namespace) -> None:
    """The data sets that were inconclusive, judged again with the runs that were said to decide added to them."""
    noise = 2 * args.noise
    print(f"\nWhat would decide, at noise {noise:.1%}: the inconclusive data sets with the planned runs added")
    for i, (name, curve) in enumerate((("slope .5 d", line(0.5 * D)), ("slope 2 d", line(2 * D)), ("slope d", line(D)))):
        rng = np.random.default_rng([200, i])
        first = [(R, judge(R)) for R in planted(curve, args.seeds, noise, args.data_sets, rng)]
        unsure = [(R, s) for R, s in first if s.verdict == "inconclusive"]
        none = sum(not s.seeds_needed and not s.next_size for _, s in unsure)
        print(f"  {name}: {len(unsure)} inconclusive, {none} with no way out")
        more = [(R, SIZES[-TOP:], s.seeds_needed - args.seeds, s.seeds_needed) for R, s in unsure if s.seeds_needed]
        again = [added(R, at, curve, runs, noise, rng) for R, at, runs, _ in more]
        print(f"    seeds: {len(more)} had a number (median {middle([m[3] for m in more]):.0f}); then {shares(again)}")
        further = [(R, np.array([s.next_size])) for R, s in unsure if s.next_size]
        again = [added(R, at, curve, args.seeds, noise, rng) for R, at in further]
        times = middle([at[0] / SIZES[-1] for _, at in further])
        print(f"    next size: {len(further)} had one (median {times:.0f}x the largest); then {shares(again)}", flush=True)


def added(R: Floats, at: Floats, curve: Curve, runs: int, noise: float, rng: np.random.Generator) -> str:
    new = planted(curve, runs, noise, 1, rng, at)[0]
    N = np.concatenate([np.repeat(SIZES, R.shape[1]), np.repeat(at, runs)])
    return saturation({"N": N, "R": np.concatenate([R.ravel(), new.ravel()])}, COLUMNS, worthwhile=D).verdict


def middle(values: list[float]) -> float:
    return float(np.median(values)) if values else float("nan")


def shares(found: list[str]) -> str:
    return ", ".join(f"{claim} {found.count(claim) / len(found):.2f}" for claim in CLAIMS if claim in found) or "nothing to judge"


def law_sizes(args: argparse.Namespace) -> None:
    """Coverage of the law's own saturation size, ceiling with a .5 (true size inside the ladder)."""
    if not args.law_data_sets:
        return
    curve = ceiling(0.6 * D, 0.5)
    grid = SIZES[0] * 2 ** np.linspace(0, 20, 200001)
    gain = curve(2 * grid) / curve(grid) - 1
    truth = grid[np.argmax(gain < D)]
    held = given = 0
    N = np.repeat(SIZES, args.seeds)
    for i, R in enumerate(planted(curve, args.seeds, args.noise, args.law_data_sets, np.random.default_rng(300))):
        table = {"N": N, "R": R.ravel(), "seed": np.tile(np.arange(args.seeds), len(SIZES))}
        found = saturation_size(fit_law(table, "ceiling", COLUMNS, loss="least-squares", bootstrap=200, seed=i), table, D)
        given += found.size is not None
        held += bool(found.low is not None and found.high is not None and found.low <= truth <= found.high)
    wrong = 0
    for R in planted(curve, args.seeds, args.noise, args.law_data_sets, np.random.default_rng(301)):
        table = {"N": N, "R": R.ravel()}
        wrong += saturation_size(fit_law(table, "log-linear", COLUMNS, loss="least-squares"), table, D).size is not None
    print(f"\nsaturation_size, {args.law_data_sets} data sets of a ceiling with its size at {truth:.3g}:")
    print(f"  ceiling law: given for {given}, of which the 90% interval holds the truth in {held / max(given, 1):.3f}")
    print(f"  log-linear law (which is wrong): given for {wrong}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", type=int, default=1000, help="per curve")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--noise", type=float, default=0.011, help="standard deviation of a run, relative")
    parser.add_argument("--law-data-sets", type=int, default=100, help="fits with bootstraps for the law's own size; 0 for none")
    args = parser.parse_args()
    verdicts(args)
    families(args)
    plans(args)
    law_sizes(args)


if __name__ == "__main__":
    main()
