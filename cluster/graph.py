"""The graph of stages that a study is made of: points, what they stand on, and the chains that run in one trial."""

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.rates import SweepTrial
from cluster.spec import Study
from gr.errors import UserError


@dataclass(frozen=True)
class Node:
    """One stage of one configuration. ``inputs``: name -> a node's id, or the absolute path of a folder from outside;
    ``launch``: what its `jobs.options.Launch` says beyond processes and threads, where that is not the default."""

    id: str
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    processes: int = 1
    threads: int = 1
    gpus: int = 0
    launch: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.stage}-{self.id}"


@dataclass(frozen=True)
class Point:
    """One row of the metrics table; the last of ``nodes`` measures it. ``widths``: evaluations of the same model with other
    numbers of beams, which are no rows of that table."""

    run_id: str
    dataset: str
    protocol: str
    paradigm: str
    model: str
    seed: int
    nodes: tuple[str, ...]
    widths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Nodes that run one after the other in one trial; ``needs``: the nodes outside that must be finished first."""

    nodes: tuple[str, ...]
    needs: frozenset[str]


@dataclass
class Plan:
    """``nodes`` are in an order in which each comes after its inputs.

    ``pending``: points that are not among ``points``, because their learning rate is not known yet, each with its ladder's name,
    with which the names of the sweeps begin that it may wait for.
    """

    study: Study
    nodes: dict[str, Node] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    trials: list[SweepTrial] = field(default_factory=list)
    pending: dict[str, str] = field(default_factory=dict)

    def part(self, trials: list[SweepTrial], points: list[Point]) -> "Plan":
        """The plan of some trials and points, and of what they stand on."""
        both: list[Point | SweepTrial] = [*trials, *points]
        needed = {node for one in both for node in self._all_of(one)}
        nodes = {id: node for id, node in self.nodes.items() if id in needed}
        return Plan(self.study, nodes, list(points), list(trials))

    def upstream(self, point: Point | SweepTrial) -> list[Node]:
        """All nodes that a point or trial stands on, its own included, inputs first."""
        found: set[str] = set()
        todo = list(point.nodes)
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += [i for i in self.nodes[node].inputs.values() if i in self.nodes]
        return [node for node in self.nodes.values() if node.id in found]

    def _all_of(self, one: Point | SweepTrial) -> set[str]:
        """`upstream`, and a point's other widths, which stand on no more than it does."""
        return {node.id for node in self.upstream(one)}.union(one.widths if isinstance(one, Point) else ())

    def beams(self, node: str) -> int:
        """Of an evaluation."""
        return int(self.nodes[node].config["beams"])

    def points_of(self) -> dict[str, frozenset[str]]:
        """Node -> the points and trials that it belongs to."""
        users: dict[str, set[str]] = {node: set() for node in self.nodes}
        both: list[Point | SweepTrial] = [*self.points, *self.trials]
        for one in both:
            for node in self._all_of(one):
                users[node].add(one.run_id)
        return {node: frozenset(points) for node, points in users.items()}

    def chains(self) -> list[Chain]:
        """The graph cut into trials: a node joins its input's chain where the same points need both and nothing comes between.

        One that needs another number of GPUs starts a trial of its own, so that none waits for an evaluation to end.
        """
        points, ancestors = self.points_of(), self._ancestors()
        chains: list[list[str]] = []
        for node in self.nodes.values():
            inputs = {i for i in node.inputs.values() if i in self.nodes}
            for chain in chains:
                known = set(chain) | ancestors[chain[0]]
                last = chain[-1]
                alike = points[last] == points[node.id] and self.nodes[last].gpus == node.gpus
                if last in inputs and alike and inputs <= known:
                    chain.append(node.id)
                    break
            else:
                chains.append([node.id])
        return [Chain(tuple(chain), frozenset(self._outside(chain))) for chain in chains]

    def _outside(self, chain: list[str]) -> Iterator[str]:
        for node in chain:
            yield from (i for i in self.nodes[node].inputs.values() if i in self.nodes and i not in chain)

    def _ancestors(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for node in self.nodes.values():
            inputs = [i for i in node.inputs.values() if i in self.nodes]
            found[node.id] = set(inputs).union(*(found[i] for i in inputs))
        return found

    def document(self) -> dict[str, Any]:
        """plan.json."""
        return {
            "study": self.study.study,
            "metric": self.study.metric,
            "worthwhile": self.study.worthwhile,
            "points": [asdict(point) for point in self.points],
            "nodes": [asdict(node) for node in self.nodes.values()],
            "trials": [asdict(trial) for trial in self.trials],
            "pending": self.pending,
        }


def width_name(run_id: str, beams: int) -> str:
    """What a point's evaluation with another width is called."""
    return f"{run_id} with {beams} beams"


def nearest_point(plan: Plan, text: str) -> Point:
    """The point whose run_id is, or alone begins with, ``text``; UserError names the nearest ones."""
    exact = [point for point in plan.points if point.run_id == text]
    found = exact or [point for point in plan.points if point.run_id.startswith(text)]
    if len(found) == 1:
        return found[0]
    ids = [point.run_id for point in found or plan.points]
    if found:
        raise UserError(f"{text}: {len(found)} points begin with it: {', '.join(ids[:6])}{' ...' if len(ids) > 6 else ''}")
    near = difflib.get_close_matches(text, ids, n=3, cutoff=0.3) or ids[:3]
    raise UserError(f"{text}: no such point; nearest: {', '.join(near)}")
