"""A training that is asked to end saves where it is, and goes on from there."""

import signal
import subprocess
import time

import pytest

from gr.files import sha256
from jobs.stop import EXIT, StopRequest
from tests.conftest import ROOT, Finished, Jobs

CONFIG = {
    "size": {"layers": 1, "d_model": 16, "heads": 2, "d_ff": 32},
    "vocab": 300,
    "optimizer": {"steps": 900, "global_batch": 16, "lr": 0.003, "validations": 2},
}


def test_once_asked_the_signals_stay_caught() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    unasked, asked = StopRequest(), StopRequest()
    try:
        with unasked.caught():
            pass
        assert not unasked.asked and {number: signal.getsignal(number) for number in before} == before
        with asked.caught():
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # the launcher's second signal: without the handler it would end this test
        assert asked.asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGUSR1])
def test_a_stopped_training_loses_no_step_and_ends_like_an_undisturbed_one(
    jobs: Jobs, split: str, number: signal.Signals
) -> None:
    if not (jobs.folder / "artifacts" / "whole").is_dir():
        jobs.run("pretrain_llm", "whole", CONFIG, split=split)
    name = f"stopped-{number.name}"
    path = jobs.write("pretrain_llm", name, CONFIG, split=split)
    process = subprocess.Popen(jobs.command("pretrain_llm", path), cwd=ROOT, env=jobs.environment())
    run = Finished(jobs.folder, name, "")
    deadline = time.monotonic() + 120
    while not (run.work / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == EXIT
    last = run.rows[-1]
    assert last["event"] == "stopped" and last["step"] < 900 and not run.out.exists()
    assert not (run.work / "failure.json").exists() and not list(run.out.parent.glob(f".{name}.*"))
    jobs.run("pretrain_llm", name, CONFIG, split=split)
    assert [row["step"] for row in run.rows if row.get("event") == "resumed"] == [last["step"]]
    whole = jobs.folder / "artifacts" / "whole"
    assert sha256(run.out / "model.safetensors") == sha256(whole / "model.safetensors")
