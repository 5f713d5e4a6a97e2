"""Which parameters the data identify, which terms do anything, and which simpler law is left when they do not."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fit.jets import constant
from fit.laws import EXPONENT_BOUNDS, Law, Term
from fit.problem import Problem, jacobian
from fit.tables import Floats

DEAD = 1e-3
"""A term is dead whose part of the fitted range is under this."""
COLLINEAR = 0.99
"""Correlation of two sizes' logarithms over which the data cannot tell the one's part from the other's."""
_PROPORTIONAL = 1 - 1e-9
_SPREAD = 4.0
_NEGLIGIBLE = 0.1
_STRAIGHT = 0.05


def collinear(sizes: Mapping[str, Floats], level: float = COLLINEAR) -> tuple[list[str], list[tuple[str, str]]]:
    """The sizes that do not vary, and the pairs whose logarithms correlate over ``level``."""
    logs = {role: np.log(values) for role, values in sizes.items()}
    still = [role for role, values in logs.items() if np.ptp(values) < 1e-9]
    moving = [role for role in logs if role not in still]
    pairs = [
        (one, other)
        for i, one in enumerate(moving)
        for other in moving[i + 1 :]
        if abs(float(np.corrcoef(logs[one], logs[other])[0, 1])) > level
    ]
    return still, pairs


def hold_lost(law: Law, sizes: Mapping[str, Floats]) -> tuple[Law, list[str]]:
    """The law with those parameters held of which the design says nothing, whatever the metric; with their names.

    A size that does not vary, or only in proportion to the one it would be added to, leaves its coupling to be anything: it is
    held at zero. Two power terms that the design thereby makes powers of one size are one term: the second is held at zero.
    """
    still, proportional = collinear(sizes, _PROPORTIONAL)
    same = {*proportional, *((b, a) for a, b in proportional)}
    couplings = [
        t.name
        for t in law.thetas
        if t.kind == "coupling" and t.lower != t.upper and (t.size in still or (t.main, t.size) in same)
    ]
    powers = [t for t in law.terms if t.log_shape is not None and t.lower != t.upper]
    twins = [
        other
        for i, one in enumerate(powers)
        for other in powers[i + 1 :]
        if one.sign == other.sign and _one_size(law, one, other, couplings, same)
    ]
    exponents = [t.name for t in law.thetas if any(t.name in twin.thetas for twin in twins)]
    held = dict.fromkeys(couplings, 0.0) | {name: 1.0 for name in exponents if name not in couplings}
    lost = [*(twin.name for twin in twins), *exponents, *(name for name in couplings if name not in exponents)]
    terms_ = tuple(replace(t, lower=0.0, upper=0.0) if t in twins else t for t in law.terms)
    thetas = tuple(replace(t, lower=held[t.name], upper=held[t.name]) if t.name in held else t for t in law.thetas)
    return replace(law, terms=terms_, thetas=thetas), [name for name in law.params if name in lost]


def _one_size(law: Law, one: Term, other: Term, lost: list[str], same: set[tuple[str, str]]) -> bool:
    """Whether the design, and not the law itself, makes two power terms powers of one size."""
    roles = [{t.size for t in law.thetas if t.name in term.thetas and t.name not in lost} for term in (one, other)]
    if any(len(found) != 1 for found in roles):
        return False
    (first,), (second,) = roles
    by_design = first != second or any(name in lost for name in (*one.thetas, *other.thetas))
    return by_design and (first == second or (first, second) in same)


def dead_thetas(law: Law, p: Floats) -> NDArray[np.bool_]:
    """(params,): nonlinear parameters whose terms all have coefficient zero, so that they mean nothing."""
    out = np.zeros(len(law.params), dtype=bool)
    for i, name in enumerate(law.params):
        coefficients = [p[j] for j, t in enumerate(law.terms) if name in t.thetas]
        out[i] = bool(coefficients) and not any(coefficients)
    return out


def standard_errors(problem: Problem, p: Floats) -> tuple[Floats, float]:
    """Linearised standard errors (params,) at ``p`` (params,), and the Jacobian's condition number.

    The condition number is of the Jacobian with unit columns, at centred logarithms of the sizes. Parameters held at a bound are
    left out of both (error 0), and so are those that then mean nothing (error infinite).
    """
    lower, upper = problem.bounds
    dead = dead_thetas(problem.law, p)
    at_bound = (p <= lower) | (p >= upper)
    live = ~(dead | at_bound)
    errors = np.where(dead, np.inf, 0.0)
    J = jacobian(problem, p[None])[0, live].T * np.sqrt(problem.weights[0])[:, None]
    r = problem.residuals(p[None])[0]
    # Huber and L1 are chosen for outliers, so their noise is read from the middle of the residuals.
    if problem.loss == "least-squares":
        variance = float(np.sum(problem.weights[0] * r**2)) / max(len(r) - len(p), 1)
    else:
        variance = (1.4826 * float(np.median(np.abs(r)))) ** 2
    norms = np.maximum(np.linalg.norm(J, axis=0), 1e-300)
    if not len(norms):
        return errors, 1.0
    _, s, vt = np.linalg.svd(J / norms, full_matrices=False)
    errors[live] = np.sqrt(variance * np.sum((vt.T / np.maximum(s, 1e-12)) ** 2, axis=1)) / norms
    return errors, float(s[0] / max(s[-1], 1e-300))


@dataclass(frozen=True)
class Terms:
    """What each varying term does over the fitted rows. ``share``: its range over that of the fitted values, over one where
    terms work against each other; ``straight``: names of power terms that are logarithms over these sizes."""

    share: dict[str, float]
    straight: tuple[str, ...]

    @property
    def dead(self) -> tuple[str, ...]:
        return tuple(name for name, share in self.share.items() if share < DEAD)


def terms(problem: Problem, p: Floats, low: Floats) -> Terms:
    """``p``, ``low``: (params,), the latter the parameters' lower 90% margins."""
    law, m = problem.law, len(problem.law.terms)
    jets = law.centred(problem.logs, problem.refs, p[None, m:])
    fitted, share, straight = problem.fitted(p[None])[0], {}, []
    for j, term in enumerate(law.terms):
        if term.shape is None and term.log_shape is None:
            continue
        values, rows = np.broadcast_to(p[j] * jets[j].value, (1, len(fitted)))[0], _rows(problem, term)
        share[term.name] = max(float(np.ptp(values[own])) / (float(np.ptp(fitted[own])) or 1.0) for own in rows)
        if term.log_shape is not None and share[term.name] >= DEAD:
            exponents = [i for i, t in enumerate(law.thetas) if t.kind == "exponent" and t.name in term.thetas]
            at_bound = any(low[m + i] <= EXPONENT_BOUNDS[0] * 1.01 < law.thetas[i].upper for i in exponents)
            power = term.log_shape(problem.logs, {t.name: constant(p[m + i]) for i, t in enumerate(law.thetas)})
            if at_bound or max(float(np.ptp(power.value[own])) for own in rows) / 8 < _STRAIGHT:
                straight.append(term.name)
    return Terms(share, tuple(straight))


def _rows(problem: Problem, term: Term) -> list[NDArray[np.intp]]:
    """The rows that a term is of: its group's, or every group's by itself."""
    return [problem.blocks[term.within]] if term.within else list(problem.blocks.values())


def unidentified(problem: Problem, p: Floats, low: Floats, high: Floats, held: list[str]) -> list[str]:
    """Parameters that the data leave open, from their 90% margins (params,) in centred units.

    An exponent or a power term's coefficient is open where it is not known within a factor of 4 or reaches its bound; a constant
    (floor or ceiling) where its margin is wider than the whole range of the metric; a coupling where it is neither known within a
    factor of 4 nor known to be negligible; a break where it may lie almost anywhere among the sizes. ``held``: those of which the
    design says nothing.
    """
    law, m = problem.law, len(problem.law.terms)
    dead = dead_thetas(law, p)
    kinds = {t.name: t.kind for t in law.thetas}
    # An exponent at its lower bound makes the power a logarithm: its coefficient and the constant are then set by the bound,
    # and look certain only because the bound does not move between draws.
    disguised = {
        name
        for i, name in enumerate(law.params)
        if kinds.get(name) == "exponent" and low[i] <= EXPONENT_BOUNDS[0] * 1.01 and not dead[i] and not problem.held[i]
    }
    out = []
    for i, name in enumerate(law.params):
        if problem.held[i]:
            shaky = name in held
        elif i < m:
            term = law.terms[i]
            if any(kinds[theta] == "exponent" for theta in term.thetas):
                shaky = p[i] > 0 and (bool(disguised & set(term.thetas)) or low[i] <= 0 or high[i] > _SPREAD * low[i])
            else:
                flat = term.shape is None and term.log_shape is None and bool(law.thetas)
                metric_range = max(float(np.ptp(problem.y[0, own])) for own in _rows(problem, term))
                shaky = flat and (bool(disguised & _beside(law, term)) or high[i] - low[i] > metric_range)
        else:
            shaky = dead[i] or _open(problem, i, low[i], high[i])
        if shaky:
            out.append(name)
    return out


def _beside(law: Law, constant_term: Term) -> set[str]:
    """The nonlinear parameters of the terms that a constant is added to."""
    together = [t for t in law.terms if "" in (t.within, constant_term.within) or t.within == constant_term.within]
    return {name for t in together for name in t.thetas}


def _open(problem: Problem, i: int, low: float, high: float) -> bool:
    theta = problem.law.thetas[i - len(problem.law.terms)]
    if theta.kind == "exponent":
        return bool(low <= EXPONENT_BOUNDS[0] * 1.01 or high >= EXPONENT_BOUNDS[1] * 0.99 or high > _SPREAD * low)
    if theta.kind == "coupling":
        unit = float(np.exp(problem.refs[theta.size] - problem.refs[theta.main])[0])
        return bool(high * unit > _NEGLIGIBLE and high > _SPREAD * max(low, 0.0))
    lower, upper = problem.bounds[0][i], problem.bounds[1][i]
    return bool(high - low > 0.8 * (upper - lower))


def reduced(problem: Problem, p: Floats, parts: Terms, open_: list[str]) -> str | None:
    """The simpler law that the data do identify, in words such as ``ceiling in N_RS``; None where the law itself is.

    A law that is more than powers and a constant (``log-linear``, ``hinge``, some formulas) has no shorter name, but for what
    it is without.
    """
    law = problem.law
    if any(t.shape is not None for t in law.terms):
        idle = [t.name for i, t in enumerate(law.terms) if t.name in parts.dead or (p[i] == 0 and t.name in parts.share)]
        return f"the law without {', '.join(idle)}" if idle else None
    powers = [t for t in law.terms if t.log_shape is not None]
    alive = [t for t in powers if t.name not in parts.dead and p[law.params.index(t.name)] != 0]
    certain = [t for t in alive if t.name not in open_ or t.name in parts.straight]
    # Twins that the data can't tell apart are one term: the one that does more stays.
    kept = certain or sorted(alive, key=lambda t: -parts.share[t.name])[:1]
    if not kept:
        return "a constant"
    straight = [t for t in kept if t.name in parts.straight]
    if len(kept) == len(powers) and not straight:
        return None
    if len(kept) > 1:
        return " + ".join(f"{'log-linear' if t in straight else 'power'} in {_main(law, t.thetas)}" for t in kept)
    if straight:
        kind = "log-linear"
    elif law.response == "R":
        kind = "ceiling"
    else:
        constants = [i for i, t in enumerate(law.terms) if t.shape is None and t.log_shape is None]
        kind = "power-floor" if any(p[i] > 0 for i in constants) else "power"
    return f"{kind} in {_main(law, kept[0].thetas)}"


def _main(law: Law, thetas: tuple[str, ...]) -> str:
    """The size that a power term is of: that its coupling is added to, else its exponent's."""
    for theta in law.thetas:
        if theta.kind == "coupling" and theta.name in thetas:
            return theta.main
    return next(t.size for t in law.thetas if t.kind == "exponent" and t.name in thetas)


__all__ = ["Terms", "collinear", "dead_thetas", "hold_lost", "reduced", "standard_errors", "terms", "unidentified"]
