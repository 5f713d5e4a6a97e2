"""The ledger of machines: properties over random work, and the one case that an order of the work alone can't settle."""

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.room import Job, Need, Room

MACHINE = Need(96, 8, 1e12)


def simulate(room: Room, arrivals: list[tuple[float, Job, float]]) -> dict[str, tuple[float, str]]:
    """When and where each job started. ``arrivals``: time, job, its true seconds; of those ready, the longest first."""
    waiting: list[Job] = []
    took = {job.name: seconds for _, job, seconds in arrivals}
    events: list[tuple[float, int, str, Job | None]] = [(at, 1, job.name, job) for at, job, _ in arrivals]
    heapq.heapify(events)
    starts: dict[str, tuple[float, str]] = {}
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            _, _, name, job = heapq.heappop(events)
            if job is None:
                room.release(name)
            else:
                waiting.append(job)
        waiting.sort(key=lambda job: -job.seconds)
        while (chosen := room.choose(waiting, now)) is not None:
            job, machine = chosen
            waiting.remove(job)
            room.take(job.name, machine, job, now)
            assert all(free >= 0 for free in room.free(machine))
            starts[job.name] = now, machine
            heapq.heappush(events, (now + took[job.name], 0, job.name, None))
    return starts


def test_a_large_rung_that_comes_late_is_not_kept_waiting_by_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 small ones run and 200 wait when it comes. It starts when a machine was expected to be empty, at 208 s, but for small
    ones that passed it and took up to half as long again; and not after them all."""
    off = random.Random(0)
    small = [(0.0, Job(f"s{i}", Need(1, 1), 100.0 + i / 2), off.uniform(50, 150)) for i in range(216)]
    large = (1.0, Job("large", Need(8, 8), 900.0), 900.0)
    starts = simulate(Room({"a": MACHINE, "b": MACHINE}), [*small, large])
    assert starts["large"][0] < 208 + 50
    assert max(at for at, _ in starts.values()) > 1000
    monkeypatch.setattr(Room, "_promise", lambda *_: None)
    assert simulate(Room({"a": MACHINE, "b": MACHINE}), [*small, large])["large"][0] > 1000


def test_what_ends_in_time_passes_the_one_that_waits() -> None:
    room = Room({"a": MACHINE})
    room.take("running", "a", Job("running", Need(8, 4), 100.0), 0.0)
    large, long, short = Job("large", Need(8, 8), 500.0), Job("long", Need(1, 1), 101.0), Job("short", Need(1, 1), 99.0)
    assert room.choose([large, long, short], 0.0) == (short, "a")
    assert room.choose([large, long], 0.0) is None
    assert room.choose([Job("large", Need(8, 7), 500.0), long], 0.0) == (long, "a")  # there is room for it beside the promise


def test_the_fullest_machine_that_has_room_is_taken() -> None:
    room = Room({"a": MACHINE, "b": MACHINE})
    room.take("x", "b", Job("x", Need(1, 2), 9.0), 0.0)
    assert room.choose([Job("y", Need(1, 2), 9.0)], 0.0) == (Job("y", Need(1, 2), 9.0), "b")
    assert room.choose([Job("y", Need(1, 8), 9.0)], 0.0) == (Job("y", Need(1, 8), 9.0), "a")


def test_a_retry_goes_elsewhere_if_it_can() -> None:
    job = Job("x", Need(1), 9.0, avoid="a")
    assert Room({"a": Need(2), "b": Need(64)}).choose([job], 0.0) == (job, "b")
    assert Room({"a": Need(2), "b": Need(0.5)}).choose([job], 0.0) == (job, "a")


def test_a_machine_that_died_gives_no_room() -> None:
    room = Room({"a": MACHINE, "b": MACHINE})
    room.take("x", "a", Job("x", Need(1, 8), 9.0), 0.0)
    room.update({"b": MACHINE})
    assert room.choose([Job("y", Need(1, 8), 9.0)], 0.0) == (Job("y", Need(1, 8), 9.0), "b")
    assert room.release("x") == "a" and not room.possible(Need(1, 9)) and room.possible(Need(1, 1, 1e15))


def test_ray_may_have_placed_it_elsewhere() -> None:
    room = Room({"a": MACHINE, "b": MACHINE})
    room.take("x", "a", Job("x", Need(1, 8), 9.0), 0.0)
    room.moved("x", "b")
    assert room.free("a") == MACHINE and room.free("b") == Need(95, 0, 1e12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.sampled_from([0.125, 0.25, 0.5, 1, 2, 4, 8]), st.floats(1, 100), st.floats(0.5, 2)),
        min_size=1,
        max_size=40,
    )
)
def test_all_work_runs_and_no_machine_is_ever_too_full(work: list[tuple[float, float, float, float]]) -> None:
    arrivals = [(at, Job(str(i), Need(1, gpus), seconds), seconds * off) for i, (at, gpus, seconds, off) in enumerate(work)]
    starts = simulate(Room({"a": MACHINE, "b": Need(96, 4, 1e12)}), arrivals)
    assert starts.keys() == {str(i) for i in range(len(work))}
    assert all(starts[job.name][0] >= at for at, job, _ in arrivals)
