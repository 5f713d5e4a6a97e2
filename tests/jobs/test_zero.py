"""One job, four ways, one result: one process, two, and DeepSpeed's ZeRO, as real processes; and checkpoints between them."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Finished, Jobs
from tests.jobs.launching import begin, launch, losses, said, training, write

pytestmark = pytest.mark.slow
SPLIT_UP = {"layers": 1, "d_model": 256, "heads": 4, "d_kv": 64, "d_ff": 512}
"""Its matrices are large enough (over 100,000 weights) for ZeRO-3 to share them out at all."""
WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"processes": 2},
    "zero-2": {"processes": 2, "zero": 2},
    "zero-3": {"processes": 2, "zero": 3, "accumulation": 2},
    "zero-3-offloaded": {"processes": 2, "zero": 3, "offload": "cpu"},
    "one-zero-1": {"processes": 1, "zero": 1},
}


def weights(run: Finished) -> dict[str, torch.Tensor]:
    return load_file(next(run.out.glob("*model.safetensors")))


def alike(one: Finished, other: Finished) -> None:
    assert losses(other) == pytest.approx(losses(one), rel=0, abs=1e-6)
    mine, its = weights(one), weights(other)
    assert mine.keys() == its.keys() and all(mine[k].shape == its[k].shape for k in mine)
    assert all(torch.allclose(mine[k], its[k], rtol=0, atol=1e-3) for k in mine)
    files = [sorted(p.name for p in run.out.iterdir()) for run in (one, other)]
    assert files[0] == files[1], "a portable folder, however it was trained"


@pytest.fixture(scope="module")
def one(jobs: Jobs, split: str, launch_sids: str) -> Finished:
    """Gradients are clipped at a norm that each of them exceeds: a clip that is left to DeepSpeed would be another one."""
    return launch(jobs, "train_sid", "zero-one", training(SPLIT_UP, clip=0.1), {}, split=split, sids=launch_sids)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one"])
def test_the_same_losses_and_weights_whichever_way(
    jobs: Jobs,
    split: str,
    launch_sids: str,
    one: Finished,
    way: str,
) -> None:
    run = launch(jobs, "train_sid", f"sid-{way}", training(SPLIT_UP, clip=0.1), WAYS[way], split=split, sids=launch_sids)
    alike(one, run)
    how = WAYS[way]
    assert run.facts["launches"] == [[0, how.get("processes", 1), how.get("zero", 0), how.get("accumulation", 1)]]
    assert run.facts["train_tokens"] == one.facts["train_tokens"]


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["encoder-decoder", "decoder-only"])
def test_what_is_read_beside_the_sids_is_shared_out_too(jobs: Jobs, split: str, launch_sids: str, architecture: str) -> None:
    """A table of users large enough for ZeRO-3 to cut it up. Of a user whose gradient is tiny Adam blows up the rounding, by the
    same 3e-5 in plain data parallelism: the losses agree less closely than those of what all users share."""
    config = training(SPLIT_UP, clip=0.1) | {"architecture": architecture, "user_tokens": 2000, "item_position": True}
    runs = [
        launch(jobs, "train_sid", f"reads-{architecture}-{way}", config, WAYS[way], split=split, sids=launch_sids)
        for way in ("one", "zero-3")
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0, abs=1e-4)
    one, other = (weights(run) for run in runs)
    assert one.keys() == other.keys() and any(key.endswith("more.weight") and w.shape == (2000, 256) for key, w in one.items())
    assert all(torch.allclose(one[key], other[key], rtol=0, atol=2e-4) for key in one), "they move by 3e-3 in six steps"


@pytest.mark.long
@pytest.mark.parametrize("stage", ["pretrain_llm", "train_llm"])
def test_the_llm_stages_too(jobs: Jobs, split: str, stage: str) -> None:
    size = {"layers": 1, "d_model": 256, "heads": 4, "d_ff": 512}
    optimizer = {"steps": 4, "global_batch": 16, "lr": 0.0005, "validations": 2, "clip": 0.1}
    pretraining = {"size": size, "vocab": 320, "max_tokens": 128, "optimizer": optimizer}
    tuning = {"lora": {"rank": 4}, "max_history": 8, "max_tokens": 128, "optimizer": optimizer, "seed": 3}
    config, inputs = (pretraining, {}) if stage == "pretrain_llm" else (tuning, {"backbone": "pretrain_llm-one"})
    runs = [launch(jobs, stage, f"{stage}-{way}", config, WAYS[way], split=split, **inputs) for way in ("one", "two", "zero-3")]
    for run in runs[1:]:
        alike(runs[0], run)


@pytest.mark.long
def test_bf16_is_autocast_in_every_way(jobs: Jobs, split: str, launch_sids: str) -> None:
    """DeepSpeed's own bf16 would train bf16 copies of the weights, whose first loss is another one already."""
    config, inputs = training(SPLIT_UP), {"split": split, "sids": launch_sids}
    plain = launch(jobs, "train_sid", "bf16", config, {"precision": "bf16"}, **inputs)
    zero = launch(jobs, "train_sid", "bf16-zero", config, {"precision": "bf16", "zero": 2}, **inputs)
    full = launch(jobs, "train_sid", "bf16-not", config, {}, **inputs)
    first = [run.rows[0]["loss"] for run in (plain, zero, full)]
    assert first[1] == pytest.approx(first[0], rel=0, abs=1e-6) and abs(first[2] - first[0]) > 1e-5
    assert losses(zero) == pytest.approx(losses(plain), abs=1e-2)


def killed(path: Path, checkpoint: str) -> None:
    """Runs until ``checkpoint`` is there, then kills the launcher with SIGKILL; none of its processes lives on."""
    process = begin(path, GRSCALE_CHECKPOINT_SECONDS="0")
    work = path.parent / "work" / path.stem / "checkpoint"
    end = time.monotonic() + 300
    while not any(p.name >= checkpoint for p in work.glob("[0-9]*")):
        assert process.poll() is None and time.monotonic() < end, said(path)[-4000:]
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(family, timeout=30)[1]


def test_killed_under_zero_3_resumes_bitwise_and_on_other_devices_nearly(
    jobs: Jobs,
    split: str,
    launch_sids: str,
) -> None:
    config, how, inputs = training(SPLIT_UP, steps=15), WAYS["zero-3"], {"split": split, "sids": launch_sids}
    calm = launch(jobs, "train_sid", "zero-calm", config, how, **inputs)
    killed(write(jobs, "train_sid", "zero-killed", config, how, **inputs), "000000005")
    work = jobs.folder / "work"
    newest = max((work / "zero-killed" / "checkpoint").glob("[0-9]*"))
    shutil.copytree(work / "zero-killed" / "checkpoint", work / "zero-moved" / "checkpoint")
    flipped = bytearray((newest / "adam.safetensors").read_bytes())
    flipped[-9] ^= 4
    (newest / "adam.safetensors").write_bytes(flipped)
    resumed = launch(jobs, "train_sid", "zero-killed", config, how, **inputs)
    assert "adam.safetensors has another checksum" in resumed.stderr
    assert [row["step"] for row in resumed.rows if row.get("event") == "resumed"] == [int(newest.name) - 1]
    mine, its = weights(calm), weights(resumed)
    assert all(torch.equal(mine[k], its[k]) for k in mine)
    moved = launch(jobs, "train_sid", "zero-moved", config, {}, **inputs)
    assert "goes on otherwise than it was begun: launch." in moved.stderr
    assert moved.facts["launches"] == [[0, 2, 3, 2], [int(newest.name), 1, 0, 1]]
    assert losses(moved) == pytest.approx({k: v for k, v in losses(calm).items() if k in losses(moved)}, rel=0, abs=1e-5)
