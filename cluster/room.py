"""Which waiting work starts where: a ledger of the machines' cores, GPUs and memory. It knows nothing of Ray or of stages."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Need(NamedTuple):
    """Cores, GPUs (a share of one for tiny work) and bytes of main memory."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory: float = 0.0

    def fits(self, free: "Need") -> bool:
        return all(mine <= its for mine, its in zip(self, free, strict=True))

    def plus(self, other: "Need") -> "Need":
        return Need(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: "Need") -> "Need":
        return Need(*(a - b for a, b in zip(self, other, strict=True)))

    def within(self, total: "Need") -> "Need":
        """With no more memory than a machine has: it is an estimate, and what would not fit by it may have a machine alone."""
        return self._replace(memory=min(self.memory, total.memory))


@dataclass(frozen=True)
class Job:
    """Work that could start now. ``seconds``: how long it is expected to run; ``avoid``: a machine, if another has room."""

    name: str
    need: Need
    seconds: float
    avoid: str | None = None


@dataclass(frozen=True)
class _Held:
    machine: str
    need: Need
    end: float


@dataclass(frozen=True)
class _Promise:
    """A machine kept for work that fits nowhere now: from ``at`` on, and ``spare`` is what it will have left over then."""

    at: float
    spare: Need


@dataclass
class Room:
    """Machines, what runs on each, and until when it is expected to.

    Work starts in the order given, each on the machine where it leaves least over, so that whole machines stay free for work of
    many GPUs. What fits nowhere gets a machine promised, the one that will have room first; later work may pass it only where
    that delays no promise: elsewhere, in what the promise leaves over, or for as long as the promise has to wait anyway. This is
    backfilling (Lifka 1995; Mu'alem and Feitelson 2001) with one promise per machine. Without promises the stream of small work
    would keep a large rung waiting to the end, where it then runs alone.
    """

    total: dict[str, Need]
    held: dict[str, _Held] = field(default_factory=dict)

    def update(self, total: dict[str, Need]) -> None:
        """Takes note of machines that joined or died."""
        self.total = total

    def possible(self, need: Need) -> bool:
        """Whether some machine, all by itself, has room."""
        return any(need.within(total).fits(total) for total in self.total.values())

    def free(self, machine: str) -> Need:
        free = self.total[machine]
        for held in self.held.values():
            if held.machine == machine:
                free = free.minus(held.need)
        return free

    def take(self, name: str, machine: str, job: Job, now: float) -> None:
        self.held[name] = _Held(machine, job.need.within(self.total[machine]), now + job.seconds)

    def moved(self, name: str, machine: str) -> None:
        """Ray put it elsewhere than it was asked to."""
        held = self.held.get(name)
        if held is not None and held.machine != machine and machine in self.total:
            self.held[name] = _Held(machine, held.need, held.end)

    def release(self, name: str) -> str | None:
        """Returns the machine where it was."""
        held = self.held.pop(name, None)
        return held.machine if held else None

    def choose(self, jobs: Iterable[Job], now: float) -> tuple[Job, str] | None:
        """The first of ``jobs`` that may start, and where."""
        free = {machine: self.free(machine) for machine in self.total}
        promises: dict[str, _Promise] = {}
        fitting: dict[Need, list[str]] = {}  # a study's jobs have few different needs
        for job in jobs:
            if job.need not in fitting:
                fitting[job.need] = [m for m in free if job.need.within(self.total[m]).fits(free[m])]
            found = fitting[job.need]
            allowed = [m for m in found if m not in promises or self._harmless(job, promises[m], m, now)]
            if allowed:
                return job, min(allowed, key=lambda m: (m == job.avoid, *_left(free[m].minus(job.need))))
            if not found and len(promises) < len(free):
                self._promise(job, free, promises, now)
        return None

    def _harmless(self, job: Job, promise: _Promise, machine: str, now: float) -> bool:
        return now + job.seconds <= promise.at or job.need.within(self.total[machine]).fits(promise.spare)

    def _promise(self, job: Job, free: dict[str, Need], promises: dict[str, _Promise], now: float) -> None:
        """Promises the machine, of those not promised yet, that will have room first."""
        best: tuple[float, str, Need] | None = None
        for machine, room in free.items():
            need = job.need.within(self.total[machine])
            if machine in promises or not need.fits(self.total[machine]):
                continue
            for held in sorted((h for h in self.held.values() if h.machine == machine), key=lambda h: h.end):
                room = room.plus(held.need)
                if need.fits(room):
                    at = max(now, held.end)
                    if best is None or at < best[0]:
                        best = at, machine, room.minus(need)
                    break
        if best:
            promises[best[1]] = _Promise(best[0], best[2])


def _left(free: Need) -> tuple[float, float, float]:
    """What would be left over, the scarcest first."""
    return free.gpus, free.cpus, free.memory
