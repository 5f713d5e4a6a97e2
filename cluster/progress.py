"""What a study is doing, read from its folder: a live table on a terminal, plain lines in a pipe."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster import cost
from cluster.graph import Node, Plan, Point
from cluster.measure import read_row
from cluster.rates import SweepTrial
from cluster.store import State, Store
from cluster.tuning import Outcome, ended

POLL = 0.5
HEARTBEAT = 15.0
"""Seconds between two looks at the folder, and between two plain lines without news."""


@dataclass
class Group:
    """The stages of one kind, or the points of one rung: what one line of the table shows."""

    name: str
    states: Counter[State] = field(default_factory=Counter)
    now: list[str] = field(default_factory=list)
    result: list[float] = field(default_factory=list)


class Watch:
    """The state of every stage, as the folder tells it. What is done stays done, and is not read again."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.states: dict[str, State] = {}
        self.metrics: dict[str, dict[str, Any]] = {}
        self.expected = {node.id: cost.seconds(plan, node) for node in plan.nodes.values()}
        self.took: dict[str, float] = {}
        self.points: dict[str, dict[str, Any]] = {}
        self.private = {node: point for point in plan.points for node in point.nodes}
        self.widths = {node: point for point in plan.points for node in point.widths}
        self.before = {
            node: [one.id for one in plan.upstream(point) if one.id != point.nodes[-1]] for node, point in self.widths.items()
        }
        """What an evaluation with another width stands on."""
        self.trials = {node: trial for trial in plan.trials for node in trial.nodes}
        self.many = len({(p.dataset, p.protocol) for p in plan.points}) > 1

    def look(self) -> list[str]:
        """Reads the folder; returns a line for each thing that happened since the last look."""
        news = []
        for node in self.plan.nodes.values():
            before = self.states.get(node.id)
            if before == "done":
                continue
            state = "done" if self._outcome(node.id) else self.store.state(node)
            self.states[node.id] = state
            if state == "running":
                self.metrics[node.id] = self.store.last_metrics(node)
            if state == "done" and (manifest := self.store.manifest(node)):  # a trial that was stopped has none
                self.took[node.id] = manifest["seconds"]
            if before is not None and before != state:
                news += self._news(node, state)
        for point in self.plan.points:
            if point.run_id not in self.points and (row := read_row(self.store.row(point))) is not None:
                self.points[point.run_id] = row
                news.append(self._measured(point))
        return news

    def _news(self, node: Node, state: State) -> list[str]:
        name = self.name(node)
        if state == "running":
            return [f"started {name}"]
        if state == "failed":
            return [f"FAILED {name}: {self.store.failure(node)}"]
        if state == "done" and node.id in self.trials:
            return [f"tried {name}: {self.tried(self.trials[node.id])}"]
        if state == "done" and node.id not in self.private:
            return [f"finished {name} in {duration(self.took[node.id])}{self._with_width(node)}"]
        return []

    def _measured(self, point: Point) -> str:
        row, metric = self.points[point.run_id], self.plan.study.metric
        loss = "" if row["loss_val"] is None else f", validation loss {row['loss_val']:.3f}"
        took = sum(self.took.get(node, 0.0) for node in point.nodes)
        return f"measured {point.run_id}: {metric} {row[metric]:.4f}{loss} in {duration(took)}"

    def name(self, node: Node) -> str:
        if node.id in self.trials:
            return f"{node.stage} {self.trials[node.id].run_id}"
        point = self.private.get(node.id) or self.widths.get(node.id)
        if point is None:
            return node.key
        width = f" with {self.plan.beams(node.id)} beams" if node.id in self.widths else ""
        return f"{node.stage} {self.rung(point)} seed {point.seed}{width}"

    def _with_width(self, node: Node) -> str:
        """``: recall@10 0.0412`` of an evaluation with another width; empty for other stages, and where it has no such metric."""
        manifest = self.store.manifest(node) if node.id in self.widths else None
        value = manifest["facts"].get(self.plan.study.metric) if manifest else None
        return "" if value is None else f": {self.plan.study.metric} {value:.4f}"

    def _outcome(self, node: str) -> Outcome | None:
        return ended(self.trials[node], self.plan, self.store) if node in self.trials else None

    def tried(self, trial: SweepTrial) -> str:
        """What became of a trial so far: its state, or ``validation loss 2.310``, ``stopped at step 40``, ``diverged``."""
        outcome = self._outcome(trial.nodes[-1])
        if outcome is None:
            return self.states[trial.nodes[-1]]
        at = f" at step {outcome.step}" if outcome.status == "stopped" else ""
        loss = f"validation loss {outcome.loss_val:.3f}" if outcome.loss_val is not None else ""
        return loss if outcome.status == "done" else f"{outcome.status}{at}{', ' if loss else ''}{loss}"

    def rung(self, point: Point) -> str:
        where = f"{point.dataset} {point.protocol} " if self.many else ""
        return f"{where}{point.paradigm} {point.model}"

    def doing(self, node: Node) -> str:
        """``step 120/400 loss 2.31`` of a running stage."""
        row = self.metrics.get(node.id, {})
        parts = []
        for of, at in (("steps", "step"), ("of", "done")):
            if at in row and of in row:
                parts.append(f"{at} {row[at]}/{row[of]}")
        if "loss" in row:
            parts.append(f"loss {row['loss']:.3f}")
        return " ".join(parts)

    def groups(self) -> list[Group]:
        found: dict[str, Group] = {}
        for node in self.plan.nodes.values():
            if node.id in self.private or node.id in self.trials or node.id in self.widths:
                continue
            group = found.setdefault(node.stage, Group(node.stage))
            group.states[self.states[node.id]] += 1
            if self.states[node.id] == "running":
                group.now.append(self.doing(node) or "starting")
        for trial in self.plan.trials:
            group = found.setdefault(trial.sweep, Group(f"{trial.sweep} lr sweep"))
            state = self.states[trial.nodes[-1]]
            group.states[state] += 1
            if state == "running":
                group.now.append(f"lr {trial.lr:g}: {self.doing(self.plan.nodes[trial.nodes[-1]])}".rstrip(": "))
        for point in self.plan.points:
            group = found.setdefault(self.rung(point), Group(self.rung(point)))
            group.states[self.point_state(point)] += 1
            for node in (self.plan.nodes[n] for n in point.nodes):
                if self.states[node.id] == "running":
                    group.now.append(f"seed {point.seed}: {node.stage.split('_')[0]} {self.doing(node)}".rstrip())
            if point.run_id in self.points:
                group.result.append(self.points[point.run_id][self.plan.study.metric])
        for id, point in self.widths.items():
            name = f"{point.paradigm}, {self.plan.beams(id)} beams"
            group = found.setdefault(name, Group(name))
            group.states[self.width_state(id)] += 1
            if self.states[id] == "running":
                group.now.append(f"{self.rung(point)} seed {point.seed}: {self.doing(self.plan.nodes[id])}".rstrip(": "))
        return list(found.values())

    def width_state(self, node: str) -> State:
        """Of an evaluation with another width, which fails with its training and what that stands on."""
        return "failed" if any(self.states[one] == "failed" for one in self.before[node]) else self.states[node]

    def point_state(self, point: Point) -> State:
        upstream = {self.states[node.id] for node in self.plan.upstream(point)}
        own = {self.states[node] for node in point.nodes}
        if upstream == {"done"}:
            return "done"
        if "failed" in upstream:
            return "failed"
        return "running" if "running" in own else "waiting"

    def totals(self) -> Counter[State]:
        """States of the points; those without a learning rate wait."""
        found: Counter[State] = Counter(self.point_state(point) for point in self.plan.points)
        found["waiting"] += len(self.plan.pending)
        return found

    def widths_left(self) -> int:
        """Evaluations with other widths that are not done and may yet be."""
        return sum(self.width_state(node) in ("running", "waiting") for node in self.widths)

    def seconds_left(self, slots: int) -> float:
        """Expected work left, by how long the finished stages of each kind really took, over what can run at once."""
        left = longest = 0.0
        lost = {node for node, state in self.states.items() if state == "failed"}
        for node in self.plan.nodes.values():
            if lost.intersection(node.inputs.values()):
                lost.add(node.id)  # it will not run
            if self.states[node.id] == "done" or node.id in lost:
                continue
            row = self.metrics.get(node.id, {}) if self.states[node.id] == "running" else {}
            share = row["step"] / row["steps"] if row.get("steps") and "step" in row else 0.0
            seconds = self.expected[node.id] * self._correction(node.stage) * (1 - share)
            left += seconds * node.processes * node.threads
            longest = max(longest, seconds)
        return max(left / slots, longest)

    def _correction(self, stage: str) -> float:
        same = [id for id in self.took if self.plan.nodes[id].stage == stage]
        some = same or list(self.took)
        expected = sum(self.expected[id] for id in some)
        start = cost.START.get(stage, cost.START_TORCH)
        return (sum(self.took[id] + start / 2 for id in some) / expected) if expected else 1.0

    def line(self, slots: int) -> str:
        """The whole study in one line."""
        t = self.totals()
        text = f"points: {t['done']} done, {t['running']} running, {t['waiting']} waiting"
        if t["failed"]:
            text += f", {t['failed']} failed"
        if self.widths:
            done = sum(self.states[node] == "done" for node in self.widths)
            text += f"; other beam widths: {done} of {len(self.widths)} done"
        running = [n for n in self.plan.nodes.values() if self.states[n.id] == "running"]
        now = "; ".join(f"{self.name(n)} {self.doing(n)}".rstrip() for n in running)
        if t["running"] + t["waiting"] or self.widths_left():
            text += f"; about {duration(self.seconds_left(slots))} left" + self._unknown()
        return text + (f" | {now}" if now else "")

    def _unknown(self) -> str:
        pending = len(self.plan.pending)
        return f" before the learning rates of {pending} points are known" if pending else ""

    def table(self, slots: int) -> Table:
        metric = self.plan.study.metric
        t = self.totals()
        points = len(self.plan.points) + len(self.plan.pending)
        title = f"{self.plan.study.study}: {t['done']} of {points} points measured"
        if t["done"] + t["failed"] < points or self.widths_left():
            title += f", about {duration(self.seconds_left(slots))} left" + self._unknown()
        table = Table(title=title, title_justify="left")
        for name in ("", "done", "running", "waiting", "failed", metric, "now"):
            table.add_column(name, justify="left" if name in ("", "now") else "right")
        for group in self.groups():
            counts = [str(group.states[state] or "") for state in ("done", "running", "waiting", "failed")]
            mean = f"{sum(group.result) / len(group.result):.4f}" if group.result else ""
            table.add_row(group.name, *counts, mean, "; ".join(group.now))
        return table


class Progress:
    """Shows a running study until the block ends; a thread of its own looks at the folder."""

    def __init__(self, plan: Plan, store: Store, slots: int = 1, console: Console | None = None) -> None:
        self.watch, self.slots = Watch(plan, store), slots
        self.console = console or Console()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.started = self.spoke = time.monotonic()
        self.said = ""
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> "Progress":
        self.watch.look()
        self._say([self.watch.line(self.slots)])
        if self.live:
            self.live.start()
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        self.thread.join()
        self._show(last=True)
        if self.live:
            self.live.stop()

    def _loop(self) -> None:
        while not self.over.wait(POLL):
            self._show()

    def _show(self, last: bool = False) -> None:
        news = self.watch.look()
        if self.live:
            self._say([line for line in news if not line.startswith("started")])
            self.live.update(self.watch.table(self.slots), refresh=True)
        else:
            due = last or time.monotonic() - self.spoke > HEARTBEAT
            self._say([*news, *([self.watch.line(self.slots)] if due else [])])

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            if line == self.said:
                continue
            self.said = line
            at = f"[{time.monotonic() - self.started:5.0f} s]"
            self.console.print(f"{at} {line}", markup=False, highlight=False, soft_wrap=True)
            self.spoke = time.monotonic()


def duration(seconds: float) -> str:
    """``41 s``, ``7 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
