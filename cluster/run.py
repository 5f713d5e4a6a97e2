"""Runs a study: what is not on disk yet, through one Ray Tune run. With nothing to do, Ray is not even imported."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster import tuning
from cluster.graph import Plan, Point, width_name
from cluster.machines import Checked, check_room, machines
from cluster.measure import refresh_rows
from cluster.plan import make_plan
from cluster.progress import Progress
from cluster.ray_cluster import connect, head_watched
from cluster.room import Need
from cluster.store import Failure, Stop, Store
from cluster.study import Loaded

INTERRUPTED = 130
GO_ON = "run the same command to go on"


def run_study(loaded: Loaded, out: Path, ray_address: str | None = None, module: str = "jobs") -> int:
    """Runs what is missing of a study and writes its report; returns the exit code (0, 1 with failed points, 130 interrupted).

    ``module``: the package whose ``<module>.<stage>`` programs are started. UserError for a mistake in the study.
    """
    store = Store(out)
    make_plan(loaded, tuning.Records(store.folder))  # before anything is written: mistakes in the study
    with store.lock():
        plan, interrupted = _sweeps(loaded, store, ray_address, module)
        if not interrupted:
            interrupted = _run_missing(plan, plan.part([], plan.points), store, ray_address, module)
        refresh_rows(store, plan)
        if interrupted:
            print(f"stopped; {GO_ON}", file=sys.stderr)
            return INTERRUPTED
        found = failures(store, plan)
        store.write_failures(found)
        _report(store, plan)
    for failure in found:
        print(f"failed: {failure.point}: {failure.reason}\n        log: {failure.log}", file=sys.stderr)
    return 1 if found else 0


def _sweeps(loaded: Loaded, store: Store, address: str | None, module: str) -> tuple[Plan, bool]:
    """Runs the trials of learning rates; returns the plan of what they decided, and whether the user stopped it.

    A sweep may wait for another one (of the backbone that it trains an adapter for), so there can be several rounds.
    """
    tried: set[str] = set()
    while True:
        plan = make_plan(loaded, tuning.Records(store.folder))
        store.prepare(plan, loaded.raw)
        store.end_groups(plan)  # of a driver that was killed
        store.sweep(plan)
        if tuning.collect(plan, store):
            continue
        trials = [trial for trial in tuning.open_trials(plan, store) if trial.run_id not in tried]
        tried.update(trial.run_id for trial in trials)
        if not trials or _run_missing(plan, plan.part(trials, []), store, address, module):
            return plan, bool(trials)


def _run_missing(plan: Plan, part: Plan, store: Store, address: str | None, module: str) -> bool:
    """Runs the stages of a part of the plan that are not finished; returns whether the user stopped it."""
    missing = [node for node in part.nodes.values() if not store.done(node)]
    for node in missing:
        (store.work(node) / "failure.json").unlink(missing_ok=True)  # every run tries again
    return bool(missing) and _run(plan, part, store, address, module)


def failures(store: Store, plan: Plan) -> list[Failure]:
    """The points without a row, and evaluations with other widths that are missing, each with the stage that failed."""
    found = [_waiting(store, plan, *pending) for pending in plan.pending.items()]
    for point in plan.points:
        undone = [node for node in plan.upstream(point) if not store.done(node)]
        if not undone:
            found += _widths(store, plan, point)
            continue
        node = next((node for node in undone if store.failure(node) is not None), undone[0])
        why = store.failure(node)
        if node.id in point.nodes:
            reason = f"{node.stage}: {why or 'did not run'}"
        else:
            reason = f"needs {node.key}, which " + (f"failed: {why}" if why else "did not run")
        found.append(Failure(point.run_id, reason, str(store.work(node) / "log.txt"), ran=why is not None))
    return found


def _widths(store: Store, plan: Plan, point: Point) -> Iterator[Failure]:
    for node in (plan.nodes[id] for id in point.widths):
        if not store.done(node):
            why = store.failure(node)
            name, log = width_name(point.run_id, plan.beams(node.id)), str(store.work(node) / "log.txt")
            yield Failure(name, f"{node.stage}: {why or 'did not run'}", log, ran=why is not None)


def _waiting(store: Store, plan: Plan, point: str, group: str) -> Failure:
    """Why a point has no learning rate yet: the trial that failed, of its own sweep before those of the rungs it goes by."""
    trials = tuning.open_trials(plan, store)
    for trial in sorted(trials, key=lambda trial: not point.startswith(trial.sweep.removesuffix("-pretrain"))):
        for node in plan.upstream(trial):
            if trial.sweep.startswith(f"{group}-") and (why := store.failure(node)) is not None:
                log = str(store.work(node) / "log.txt")
                return Failure(point, f"its learning rate's sweep: {trial.run_id}: {node.stage} failed: {why}", log)
    return Failure(point, "its learning rate's sweep did not run", str(store.folder / "work"), ran=False)


def _report(store: Store, plan: Plan) -> None:
    if not any(store.row(point).is_file() for point in plan.points):
        print("no point was measured, so there is no report")
        return
    from cluster.report import verdict_lines, write_report

    report = write_report(store.folder)
    for line in verdict_lines(report):
        print(line)
    print(f"report: {store.folder / 'report' / 'index.html'}")


def _run(plan: Plan, part: Plan, store: Store, address: str | None, module: str) -> bool:
    """Runs the missing stages of a part of the plan, and shows all of it; returns whether the user stopped it."""
    stop = Stop()
    with _signals(stop), Progress(plan, store, slots=slots()):
        _with_ray(part, store, address, module, stop)
    return stop.asked


def _with_ray(plan: Plan, store: Store, address: str | None, module: str, stop: Stop) -> None:
    connect(address, slots())
    import ray

    try:
        catch(stop)  # ray.init puts its own handler of SIGTERM in place, which aborts
        with contextlib.ExitStack() as stack:
            having: Callable[[], dict[str, Need]] = machines
            if address:
                having = stack.enter_context(Checked(plan, store))
                having.wait()
            if not stop.asked:
                with head_watched(address, GO_ON):
                    _tune(plan, store, module, stop, having)
    finally:
        ray.shutdown()
        store.end_groups(plan)


def _tune(plan: Plan, store: Store, module: str, stop: Stop, having: Callable[[], dict[str, Need]]) -> None:
    from ray import tune

    from cluster.schedule import Schedule, Stopped, resources
    from cluster.trial import Trial

    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told in the study's own words
    schedule = Schedule(plan, store, module, stop, having)
    stopping = {}
    if plan.trials:  # never of measured points, which no such plan has
        from cluster.stopping import PerSweep

        stopping = {"scheduler": PerSweep(plan, store)}
    check_room(plan, [(id, need) for id, need in schedule.needs.items() if id not in schedule.finished], schedule.room.total)
    tuner = tune.Tuner(
        tune.with_resources(Trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=schedule,
            **stopping,
            num_samples=2 * len(schedule.waiting),  # each may be tried twice
            reuse_actors=True,
            metric=None,
            mode=None,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(store.folder / "work" / "tune"),
            failure_config=tune.FailureConfig(max_failures=0),  # who is tried again is the schedule's to say
            stop=Stopped(stop),
            verbose=0,
        ),
    )
    tuner.fit()


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for a clean end; the second one ends it at once."""

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    catch(stop)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def catch(stop: Stop) -> None:
    """Lets SIGINT and SIGTERM ask for the end; does nothing in a thread, which can't handle signals."""

    def ask(*_: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)


def slots() -> int:
    """Cores of this machine that the study may use: no more than a container's quota."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
