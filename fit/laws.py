"""The laws, as sums of terms: each a linear parameter times a shape of the sizes and the nonlinear parameters.

`R` is a gain such as recall, `L` a loss. The solver asks a law only for its shapes and their derivatives, so a law may as well
come from a formula (`fit.formula`).
Sources: `power` and `power-floor`, Kaplan et al. 2020 (arXiv 2001.08361) and Henighan et al. 2020 (2010.14701); `chinchilla`,
Hoffmann et al. 2022 (2203.15556) eq. 2; `ceiling`, `two-term`, `sid` and `llm`, Liu et al. 2025 (2509.25522); `broken`, one break
of Caballero et al. 2023 (2210.14891) eq. 1 with its sharpness held, which ten sizes cannot tell.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fit.errors import FitError
from fit.jets import Jet, constant, exp, log, minimum, softplus
from fit.tables import Floats

Kind = Literal["exponent", "coupling", "break", "free"]
Logs = Mapping[str, Floats]
Thetas = Mapping[str, Jet]
Shape = Callable[[Logs, Thetas], Jet]

EXPONENT_BOUNDS = (0.01, 5.0)
"""Below .01 a power law cannot be told from a logarithm, above 5 from a step; a fit that ends there says `bound:`."""
SHARPNESS = 4.0
"""Of the broken law's bend: about a factor of two in size from one exponent to the other."""


@dataclass(frozen=True)
class Term:
    """``sign * name * shape``, a constant without a shape.

    ``log_shape``: the shape's logarithm, for shapes that are always positive; they are measured against their value at the
    sizes' geometric means, without which a coefficient and its exponent would move together over many powers of ten.
    """

    name: str
    shape: Shape | None = None
    log_shape: Shape | None = None
    sign: int = 1
    lower: float = -np.inf
    upper: float = np.inf
    centred: bool = True
    thetas: tuple[str, ...] = ()
    """The nonlinear parameters that the shape depends on."""
    within: str = ""
    """Name of an indicator among the logarithms, 1 in the rows that the term is of and 0 elsewhere (see `fit.groups`)."""


@dataclass(frozen=True)
class Nonlinear:
    """A nonlinear parameter. ``kind`` says where to search: exponents in `EXPONENT_BOUNDS`, couplings of one size to another from
    zero on, breaks among the sizes (searched by their logarithm), others between the bounds that the user must give."""

    name: str
    kind: Kind = "exponent"
    lower: float = EXPONENT_BOUNDS[0]
    upper: float = EXPONENT_BOUNDS[1]
    size: str = ""
    """Of a coupling: the size that it multiplies; of a break or exponent: its size."""
    main: str = ""
    """Of a coupling: the size that it is added to."""


@dataclass(frozen=True)
class Law:
    name: str
    formula: str
    response: str
    sizes: tuple[str, ...]
    terms: tuple[Term, ...]
    thetas: tuple[Nonlinear, ...] = ()
    groups: "tuple[tuple[str, Law], ...]" = ()
    """Of a law over several groups of rows (`fit.groups`): each group's name and its law alone."""

    @property
    def linear(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.terms)

    @property
    def nonlinear(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.thetas)

    @property
    def params(self) -> tuple[str, ...]:
        """Linear parameters, then nonlinear ones: the order of every parameter vector in this package."""
        return self.linear + self.nonlinear

    @property
    def free(self) -> int:
        """How many parameters are not held at one value."""
        return sum(t.lower < t.upper for t in self.terms) + sum(t.lower < t.upper for t in self.thetas)

    @property
    def separate(self) -> bool:
        """Whether it is of several groups that share no parameter, so that each can be fitted alone."""
        return bool(self.groups) and not set(self.params) & set(self.groups[0][1].params)

    def jets(self, logs: Logs, theta: Floats) -> list[Jet]:
        """Each term's signed raw shape at ``theta`` (draws, nonlinear); ``logs``: logarithms of the sizes, (rows,) each."""
        named = {name: Jet(theta[:, i, None], {i: np.ones((1, 1))}) for i, name in enumerate(self.nonlinear)}
        return [_shape(term, logs, named, None) for term in self.terms]

    def centred(self, logs: Logs, refs: Logs, theta: Floats) -> list[Jet]:
        """As `jets`, centred shapes over their value at ``refs``, the logarithms of one row of sizes, (1,) each."""
        named = {name: Jet(theta[:, i, None], {i: np.ones((1, 1))}) for i, name in enumerate(self.nonlinear)}
        return [_shape(term, logs, named, refs if term.centred else None) for term in self.terms]

    def uncentre(self, p: Floats, refs: Logs) -> Floats:
        """Parameters (draws, params) of raw shapes from those of centred ones."""
        out = np.array(p, dtype=np.float64)
        m = len(self.terms)
        named = {name: constant(p[:, m + i, None]) for i, name in enumerate(self.nonlinear)}
        for j, term in enumerate(self.terms):
            if term.centred and term.log_shape is not None:
                with np.errstate(over="ignore"):
                    out[:, j] *= np.exp(-np.broadcast_to(term.log_shape(refs, named).value, (len(p), 1))[:, 0])
        return out


def _shape(term: Term, logs: Logs, thetas: Thetas, refs: Logs | None) -> Jet:
    if term.log_shape is not None:
        power = term.log_shape(logs, thetas)
        jet = exp(power - term.log_shape(refs, thetas) if refs is not None else power)
    elif term.shape is not None:
        jet = term.shape(logs, thetas)
    else:
        jet = constant(np.ones(len(next(iter(logs.values())))))
    if term.within:
        jet = jet.scaled(logs[term.within])
    return jet if term.sign > 0 else -jet


def power_of(size: str, exponent: str) -> Shape:
    """log of size^-exponent."""
    return lambda logs, p: p[exponent].scaled(-logs[size])


def power_of_sum(sizes: Mapping[str, str], main: str, exponent: str) -> Shape:
    """log of (main + coupling * size + ...)^-exponent; ``sizes``: coupling -> size."""

    def shape(logs: Logs, p: Thetas) -> Jet:
        ratio = constant(1.0)
        for coupling, size in sizes.items():
            ratio = ratio + p[coupling].scaled(np.exp(logs[size] - logs[main]))
        return -(p[exponent] * (constant(logs[main]) + log(ratio)))

    return shape


def _log2(size: str) -> Shape:
    return lambda logs, _: constant(logs[size] / np.log(2.0))


def _flat_beyond(logs: Logs, p: Thetas) -> Jet:
    return minimum(constant(logs["N"]), p["N0"]).scaled(1.0 / np.log(2.0))


def _one_break(logs: Logs, p: Thetas) -> Jet:
    bend = softplus((constant(logs["N"]) - p["N0"]).scaled(SHARPNESS)).scaled(1.0 / SHARPNESS)
    return -(p["a"].scaled(logs["N"]) + p["b"] * bend)


def _ceiling_terms(one: tuple[Shape, *tuple[str, ...]], other: tuple[Shape, *tuple[str, ...]] | None = None) -> tuple[Term, ...]:
    terms = [Term("R0"), Term("A", log_shape=one[0], sign=-1, lower=0.0, thetas=one[1:])]
    return (*terms, Term("B", log_shape=other[0], sign=-1, lower=0.0, thetas=other[1:])) if other else tuple(terms)


_E = Term("E", lower=0.0)
_A = Term("A", log_shape=power_of("N", "a"), lower=0.0, thetas=("a",))


def _exponent(name: str, size: str) -> Nonlinear:
    return Nonlinear(name, size=size)


def _coupling(name: str, size: str, main: str) -> Nonlinear:
    return Nonlinear(name, "coupling", 0.0, np.inf, size, main)


LAWS = {
    law.name: law
    for law in (
        Law("power", "L = A/N^a", "L", ("N",), (_A,), (_exponent("a", "N"),)),
        Law("power-floor", "L = E + A/N^a", "L", ("N",), (_E, _A), (_exponent("a", "N"),)),
        Law("ceiling", "R = R0 - A/N^a", "R", ("N",), _ceiling_terms((power_of("N", "a"), "a")), (_exponent("a", "N"),)),
        Law("log-linear", "R = c + g log2 N", "R", ("N",), (Term("c"), Term("g", _log2("N")))),
        Law(
            "hinge",
            "R = c + g log2 min(N, N0)",
            "R",
            ("N",),
            (Term("c"), Term("g", _flat_beyond, thetas=("N0",))),
            (Nonlinear("N0", "break", 0.0, np.inf, "N"),),
        ),
        Law(
            "broken",
            "L = E + A/(N^a (1 + (N/N0)^4)^(b/4))",
            "L",
            ("N",),
            (_E, Term("A", log_shape=_one_break, lower=0.0, thetas=("a", "b", "N0"))),
            (_exponent("a", "N"), Nonlinear("b", "free", -1.0, 5.0), Nonlinear("N0", "break", 0.0, np.inf, "N")),
        ),
        Law(
            "two-term",
            "R = R0 - A/N_SI^a - B/N_CF^b",
            "R",
            ("N_SI", "N_CF"),
            _ceiling_terms((power_of("N_SI", "a"), "a"), (power_of("N_CF", "b"), "b")),
            (_exponent("a", "N_SI"), _exponent("b", "N_CF")),
        ),
        Law(
            "sid",
            "R = R0 - A/(N_RS + g1 N_LLM + g2 N_QT)^a - B/N_RS^b",
            "R",
            ("N_RS", "N_LLM", "N_QT"),
            _ceiling_terms(
                (power_of_sum({"g1": "N_LLM", "g2": "N_QT"}, "N_RS", "a"), "a", "g1", "g2"), (power_of("N_RS", "b"), "b")
            ),
            (_exponent("a", "N_RS"), _exponent("b", "N_RS"), _coupling("g1", "N_LLM", "N_RS"), _coupling("g2", "N_QT", "N_RS")),
        ),
        Law(
            "llm",
            "R = R0 - A/(N_LORA + g N_LLM)^a - B/(N_LORA + h N_LLM)^b",
            "R",
            ("N_LORA", "N_LLM"),
            _ceiling_terms(
                (power_of_sum({"g": "N_LLM"}, "N_LORA", "a"), "a", "g"), (power_of_sum({"h": "N_LLM"}, "N_LORA", "b"), "b", "h")
            ),
            (
                _exponent("a", "N_LORA"),
                _exponent("b", "N_LORA"),
                _coupling("g", "N_LLM", "N_LORA"),
                _coupling("h", "N_LLM", "N_LORA"),
            ),
        ),
        Law(
            "chinchilla",
            "L = E + A/N^a + B/D^b",
            "L",
            ("N", "D"),
            (_E, _A, Term("B", log_shape=power_of("D", "b"), lower=0.0, thetas=("b",))),
            (_exponent("a", "N"), _exponent("b", "D")),
        ),
    )
}


def law_named(name: str) -> Law:
    """A law by its name, or from its formula (see `fit.formula.parse`); FitError for neither."""
    if name in LAWS:
        return LAWS[name]
    if any(c in name for c in "+*/^(="):
        from fit.formula import parse

        return parse(name)
    raise FitError(f"unknown law {name!r}; there are {', '.join(LAWS)}, or a formula such as 'E + A/N**a'")


def constrained(law: Law, bounds: Mapping[str, tuple[float, float]], fixed: Mapping[str, float]) -> Law:
    """The law with the user's bounds; a fixed parameter's bounds are its value. Values are those of raw shapes, so the shapes of
    such terms are not centred."""
    both = {**bounds, **{name: (value, value) for name, value in fixed.items()}}
    for name, (low, high) in both.items():
        if name not in law.params:
            raise FitError(f"law {law.name} has no parameter {name!r}; it has {', '.join(law.params)}")
        if not low <= high or np.isnan([low, high]).any():
            raise FitError(f"{name}: bounds {low:g} to {high:g} are not from low to high")
    terms = tuple(
        replace(t, lower=both[t.name][0], upper=both[t.name][1], centred=False) if t.name in both else t for t in law.terms
    )
    thetas = tuple(replace(t, lower=both[t.name][0], upper=both[t.name][1]) if t.name in both else t for t in law.thetas)
    return replace(law, terms=terms, thetas=thetas)
