"""One law for several groups of rows at once: some parameters are one number for all of them, the others one per group.

A grouped law is a law like any other: for each group v and term ``A`` a term ``A[v]``, which is zero outside the group's rows,
and nonlinear parameters ``a[v]``; what is shared keeps its name. Among the logarithms of its sizes are, for each group v, the
indicator ``[v]`` (1 in its rows, else 0) and its own sizes ``N[v]`` (elsewhere their mean, so that means and ranges are the
group's).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fit.errors import FitError
from fit.identify import collinear, hold_lost
from fit.jets import Jet
from fit.laws import Law, Logs, Nonlinear, Shape, Term, Thetas, constrained
from fit.problem import Problem
from fit.tables import Floats, column
from fit.uncertainty import Design

if TYPE_CHECKING:
    import pyarrow as pa

Bounds = Mapping[str, tuple[float, float]]
_FORBIDDEN = "[],=~"
"""In a group's name: they would break the parameters' names and the warnings' codes."""


@dataclass(frozen=True)
class Groups:
    """How the rows of a fit were grouped: by ``column``, whose ``levels`` share the parameters ``shared``. ``member`` (rows,):
    each row's place among the levels; ``sizes`` and ``objectives`` are each level's own."""

    column: str
    levels: tuple[str, ...]
    shared: tuple[str, ...]
    member: NDArray[np.intp]
    sizes: tuple[dict[str, tuple[float, float]], ...] = ()
    objectives: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"column": self.column, "levels": list(self.levels), "shared": list(self.shared)}


def read_groups(table: "pa.Table", name: str, law: Law, shared: Sequence[str]) -> Groups:
    """The groups that a column makes; FitError for fewer than two, a cell without a name, and a name or shared parameter that
    cannot be one."""
    for parameter in shared:
        if parameter not in law.params:
            raise FitError(f"shared: law {law.name} has no parameter {parameter!r}; it has {', '.join(law.params)}")
    if len(set(shared)) < len(shared):
        raise FitError(f"shared: {', '.join(shared)} has a parameter twice")
    cells, levels = read_levels(table, name)
    for level in levels:
        if set(level) & set(_FORBIDDEN) or not level.isprintable() or level != level.strip():
            raise FitError(
                f"column {name!r}: a group cannot be named {level!r}; rename it without {' '.join(_FORBIDDEN)} or outer spaces"
            )
    if len(levels) < 2:
        raise FitError(f"column {name!r}: one group only ({levels[0]}); there is nothing to share, fit it without groups")
    at = {level: k for k, level in enumerate(levels)}
    member = np.array([at[cell] for cell in cells], dtype=np.intp)
    return Groups(name, levels, tuple(p for p in law.params if p in shared), member)


def read_levels(table: "pa.Table", name: str) -> tuple[list[str], tuple[str, ...]]:
    """Each row's group, and the groups in order."""
    cells = column(table, name).to_pylist()
    for row, cell in enumerate(cells, 1):
        if cell is None or cell == "":
            raise FitError(f"column {name!r}, row {row}: empty; every row needs a group")
    texts = [str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell) for cell in cells]
    return texts, tuple(dict.fromkeys(text for _, text in sorted(zip(cells, texts, strict=True))))


def group_law(
    law: Law, values: Mapping[str, Floats], groups: Groups, bounds: Bounds, fixed: Mapping[str, float]
) -> tuple[Law, list[str]]:
    """The law over the groups, and the names of its parameters of which the design says nothing (held, see `hold_lost`).

    ``values``: the sizes, (rows,) each. Bounds and fixed values are of ``A``, in every group, or of ``A[v]``, in one.
    """
    everywhere = _of_level(law, groups, bounds), _of_level(law, groups, fixed)
    pooled, lost_of_all = hold_lost(constrained(law, *everywhere), values)
    own, lost_of_each = [], []
    for k, level in enumerate(groups.levels):
        here = constrained(law, _of_level(law, groups, bounds, level), _of_level(law, groups, fixed, level))
        kept, lost = hold_lost(here, {role: v[groups.member == k] for role, v in values.items()})
        own.append(kept)
        lost_of_each.append(lost)
    # A size may stand still in each group and yet differ between them; only what no group and not all together tell is lost.
    common = [name for name in lost_of_all if name in groups.shared and all(name in lost for lost in lost_of_each)]
    free = constrained(law, *everywhere)
    shared_terms = {t.name: t for t in free.terms} | {t.name: t for t in pooled.terms if t.name in common}
    shared_thetas = {t.name: t for t in free.thetas} | {t.name: t for t in pooled.thetas if t.name in common}
    terms = [
        grouped
        for j, term in enumerate(law.terms)
        for grouped in (
            [_shared_term(law, shared_terms[term.name], groups)]
            if term.name in groups.shared
            else [_own_term(law, part.terms[j], level, groups) for level, part in zip(groups.levels, own, strict=True)]
        )
    ]
    thetas = [
        grouped
        for i, theta in enumerate(law.thetas)
        for grouped in (
            [shared_thetas[theta.name]]
            if theta.name in groups.shared
            else [_own_theta(part.thetas[i], level) for level, part in zip(groups.levels, own, strict=True)]
        )
    ]
    made = replace(law, terms=tuple(terms), thetas=tuple(thetas), groups=tuple(zip(groups.levels, own, strict=True)))
    alone = {f"{name}[{level}]" for level, names in zip(groups.levels, lost_of_each, strict=True) for name in names}
    return made, [name for name in made.params if name in alone or name in common]


def _of_level(law: Law, groups: Groups, given: Mapping[str, Any], level: str | None = None) -> dict[str, Any]:
    """What is given for every group and, before it, for one; FitError for a name that is no parameter's."""
    out = {name: value for name, value in given.items() if name in law.params}
    for name, value in given.items():
        if name in law.params:
            continue
        parameter, bracket, rest = name.partition("[")
        if parameter not in law.params or not bracket or rest[:-1] not in groups.levels or rest[-1:] != "]":
            known = ", ".join(law.params)
            raise FitError(
                f"law {law.name} has no parameter {name!r}; it has {known}, "
                f"and of each group (by {groups.column!r}) such as {law.params[0]}[{groups.levels[0]}]"
            )
        if parameter in groups.shared:
            raise FitError(f"{name}: {parameter} is shared by all groups; give it as {parameter}")
        if rest[:-1] == level:
            out[parameter] = value
    return out


def _own_name(name: str, level: str, groups: Groups) -> str:
    return name if name in groups.shared else f"{name}[{level}]"


def _own_term(law: Law, term: Term, level: str, groups: Groups) -> Term:
    return replace(
        term,
        name=f"{term.name}[{level}]",
        shape=_own_shape(law, term.shape, level, groups) if term.shape else None,
        log_shape=_own_shape(law, term.log_shape, level, groups) if term.log_shape else None,
        thetas=tuple(_own_name(name, level, groups) for name in term.thetas),
        within=f"[{level}]",
    )


def _own_theta(theta: Nonlinear, level: str) -> Nonlinear:
    size, main = (f"{role}[{level}]" if role else "" for role in (theta.size, theta.main))
    return replace(theta, name=f"{theta.name}[{level}]", size=size, main=main)


def _own_shape(law: Law, shape: Shape, level: str, groups: Groups) -> Shape:
    """The shape at the group's own sizes and parameters."""
    sizes = {role: f"{role}[{level}]" for role in law.sizes}
    names = {name: _own_name(name, level, groups) for name in law.nonlinear}

    def own(logs: Logs, thetas: Thetas) -> Jet:
        return shape({role: logs[key] for role, key in sizes.items()}, {name: thetas[key] for name, key in names.items()})

    return own


def _shared_term(law: Law, term: Term, groups: Groups) -> Term:
    """One coefficient for all rows. Where the shape's parameters are each group's own, so is the shape of each row; measured
    against the mean over the rows of its logarithm (the indicators' means are the groups' parts of the rows)."""
    if all(name in groups.shared for name in term.thetas):
        return term

    def by_group(shape: Shape) -> Shape:
        own = [(f"[{level}]", _own_shape(law, shape, level, groups)) for level in groups.levels]

        def of_rows(logs: Logs, thetas: Thetas) -> Jet:
            first, *rest = (part(logs, thetas).scaled(logs[indicator]) for indicator, part in own)
            for jet in rest:
                first = first + jet
            return first

        return of_rows

    return replace(
        term,
        shape=by_group(term.shape) if term.shape else None,
        log_shape=by_group(term.log_shape) if term.log_shape else None,
        thetas=tuple(dict.fromkeys(_own_name(name, level, groups) for name in term.thetas for level in groups.levels)),
    )


def group_logs(logs: Logs, groups: Groups) -> dict[str, Floats]:
    """The logarithms (rows,) that a grouped law asks for."""
    out = dict(logs)
    for k, level in enumerate(groups.levels):
        inside = groups.member == k
        out[f"[{level}]"] = inside.astype(np.float64)
        for role, values in logs.items():
            out[f"{role}[{level}]"] = np.where(inside, values, values[inside].mean())
    return out


def ranges(values: Mapping[str, Floats], groups: Groups) -> tuple[dict[str, tuple[float, float]], ...]:
    """Least and largest size of each role, of each group."""
    inside = [groups.member == k for k in range(len(groups.levels))]
    return tuple({role: (float(v[rows].min()), float(v[rows].max())) for role, v in values.items()} for rows in inside)


def objectives(problem: Problem, p: Floats, groups: Groups, factor: float) -> tuple[float, ...]:
    """Each group's part of the objective at ``p`` (params,), times ``factor``."""
    inside = [groups.member == k for k in range(len(groups.levels))]
    return tuple(float(replace(problem, weights=problem.weights * rows).objective(p[None])[0]) * factor for rows in inside)


def check_groups(problem: Problem, groups: Groups, design: Design, metric: str) -> None:
    """FitError for a group that cannot carry its own parameters, or whose metric is constant."""
    for k, (level, part) in enumerate(problem.law.groups):
        own = sum(not problem.held[i] for i in positions(problem.law, level, part) if problem.law.params[i] not in part.params)
        count = len(np.unique(design.rung[groups.member == k]))
        if count < own:
            raise FitError(
                f"group {level!r}: {count} distinct size{'s' * (count != 1)} cannot carry the {own} parameters that are its own"
            )
        y = problem.y[0, groups.member == k] * problem.scale
        if np.ptp(y) == 0:
            raise FitError(f"column {metric!r}, group {level!r}: every value is {y[0]:g}; a constant metric has no law")


def positions(law: Law, level: str, part: Law) -> NDArray[np.intp]:
    """Where a group's parameters are among those of the law over all groups."""
    at = {name: i for i, name in enumerate(law.params)}
    return np.array([at[name] if name in at else at[f"{name}[{level}]"] for name in part.params], dtype=np.intp)


def split(problem: Problem) -> list[tuple[NDArray[np.intp], Problem]]:
    """Each group's problem alone, with the positions of its parameters. Its unshared parameters are in the same units."""
    law, m = problem.law, len(problem.law.terms)
    out = []
    for level, part in law.groups:
        at, rows, k = positions(law, level, part), problem.blocks[f"[{level}]"], len(part.terms)
        terms = tuple(
            replace(term, lower=whole.lower, upper=whole.upper, centred=whole.centred)
            for term, whole in zip(part.terms, (law.terms[i] for i in at[:k]), strict=True)
        )
        thetas = tuple(
            replace(theta, lower=whole.lower, upper=whole.upper)
            for theta, whole in zip(part.thetas, (law.thetas[i - m] for i in at[k:]), strict=True)
        )
        own = replace(
            problem,
            law=replace(part, terms=terms, thetas=thetas),
            logs={role: problem.logs[f"{role}[{level}]"][rows] for role in part.sizes},
            y=problem.y[:, rows],
            weights=problem.weights[:, rows],
            around={role: problem.refs[f"{role}[{level}]"] for role in part.sizes},
        )
        out.append((at, own))
    return out


def design_warnings(problem: Problem, lost: list[str]) -> list[str]:
    """``constant:`` and ``collinear:`` of each group's sizes; of all groups' where all say the same."""
    having: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for level, part in problem.law.groups:
        rows = problem.blocks[f"[{level}]"]
        still, pairs = collinear({role: np.exp(problem.logs[role][rows]) for role in part.sizes})
        for role in still if lost or len(part.sizes) > 1 else ():
            having.setdefault(("constant:", (role,)), []).append(level)
        for pair in pairs:
            having.setdefault(("collinear:", pair), []).append(level)
    out = []
    for (code, roles), levels in having.items():
        if len(levels) == len(problem.law.groups):
            out.append(code + "~".join(roles))
        else:
            out += [code + "~".join(f"{role}[{level}]" for role in roles) for level in levels]
    return out
