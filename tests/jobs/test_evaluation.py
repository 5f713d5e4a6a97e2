"""An evaluation by real processes: killed and gone on with, and shared by two, each ending as an undisturbed one does."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.split import Split
from gr.metrics import COLD_AT, ranking_metrics
from jobs.evaluation import CHUNK, NUMBERS
from tests.conftest import ROOT, WORLD, Finished, Jobs

CONFIG = {"batch": 4}
OPTIMIZER = {"steps": 4, "global_batch": 16, "lr": 0.005, "validations": 1}
RATES = {"eval_seconds", "users_per_second", "resumed_users"}


@pytest.fixture(scope="module")
def evaluated(jobs: Jobs, split: str, launch_sids: str) -> dict[str, dict[str, str]]:
    """Stage -> the inputs of an evaluation."""
    size = {"layers": 1, "d_model": 16, "heads": 2, "d_ff": 32}
    train_sid = {"size": size | {"d_kv": 8}, "max_history": 8, "optimizer": OPTIMIZER, "seed": 0}
    jobs.run("train_sid", "shared-sid", train_sid, split=split, sids=launch_sids)
    jobs.run("pretrain_llm", "shared-backbone", {"size": size, "vocab": 320, "optimizer": OPTIMIZER}, split=split)
    llm = {"tune": "full", "max_history": 8, "max_tokens": 256, "optimizer": OPTIMIZER, "seed": 0}
    jobs.run("train_llm", "shared-llm", llm, split=split, backbone="shared-backbone")
    return {
        "evaluate_sid": {"split": split, "sids": launch_sids, "model": "shared-sid"},
        "evaluate_llm": {"split": split, "backbone": "shared-backbone", "model": "shared-llm"},
    }


def result(done: Finished) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the table, and the facts but for the rates."""
    facts = {name: value for name, value in done.facts.items() if name not in RATES}
    return (done.out / "hits.parquet").read_bytes(), facts


def killed_after_a_chunk(jobs: Jobs, stage: str, name: str, inputs: dict[str, str]) -> list[Path]:
    """The files of the chunks that a run had done when it was killed."""
    command = jobs.command(stage, jobs.write(stage, name, CONFIG, **inputs))
    place = jobs.folder / "work" / name / "checkpoint"
    with (jobs.folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=jobs.environment(), stdout=log, stderr=log)
    until = time.monotonic() + 240
    while len(list(place.glob("*/*.parquet"))) < 3:
        assert process.poll() is None and time.monotonic() < until, Path(log.name).read_text()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return sorted(place.glob("*/[0-9]*.parquet"))


def flip_a_bit(file: Path) -> None:
    """Of the numbers in it."""
    column = pq.read_metadata(file).row_group(0).column(0)
    data = bytearray(file.read_bytes())
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["evaluate_sid", "evaluate_llm"])
def test_killed_or_shared_an_evaluation_ends_like_an_undisturbed_one(
    jobs: Jobs, evaluated: dict[str, dict[str, str]], stage: str
) -> None:
    inputs = evaluated[stage]
    calm = jobs.run(stage, f"{stage}-calm", CONFIG, **inputs)
    users = calm.facts["evaluated_users"]
    assert calm.facts["resumed_users"] == 0 and calm.facts["infer_flops_per_user"] > 0 and calm.facts["users_per_second"] > 0
    two = jobs.run(stage, f"{stage}-two", CONFIG, processes=2, **inputs)
    assert result(two) == result(calm)

    files = killed_after_a_chunk(jobs, stage, f"{stage}-killed", inputs)
    assert 3 <= len(files) < -(-users // (CHUNK * CONFIG["batch"])), "it was killed in the middle"
    first = pq.read_table(files[0])
    numbers = json.loads(first.schema.metadata[NUMBERS]) | {"seconds": 1e6}
    pq.write_table(first.replace_schema_metadata({NUMBERS: json.dumps(numbers)}), files[0])
    files[1].write_bytes(files[1].read_bytes()[:100])
    flip_a_bit(files[2])
    again = jobs.run(stage, f"{stage}-killed", CONFIG, **inputs)
    assert result(again) == result(calm)
    assert again.facts["resumed_users"] == (len(files) - 2) * CHUNK * CONFIG["batch"], "the torn ones are done again"
    assert again.facts["eval_seconds"] > 1e6, "a finished chunk was done again"
    assert any(row.get("event") == "resumed" and row["of"] == users for row in again.rows)
    assert not (again.work / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.long
def test_two_go_on_where_one_was_killed_and_another_configuration_takes_up_nothing(
    jobs: Jobs, evaluated: dict[str, dict[str, str]]
) -> None:
    stage, inputs = "evaluate_sid", evaluated["evaluate_sid"]
    calm = jobs.run(stage, "calm-for-two", CONFIG, **inputs)
    files = killed_after_a_chunk(jobs, stage, "one-then-two", inputs)
    two = jobs.run(stage, "one-then-two", CONFIG, processes=2, **inputs)
    assert result(two) == result(calm) and two.facts["resumed_users"] == len(files) * CHUNK * CONFIG["batch"]
    killed_after_a_chunk(jobs, stage, "then-other", inputs)
    other = jobs.run(stage, "then-other", CONFIG | {"users": 50}, **inputs)
    assert other.facts["resumed_users"] == 0 and other.facts["evaluated_users"] == 50


def test_the_cold_slice_is_of_targets_with_few_training_interactions(jobs: Jobs) -> None:
    """Of a world with as many items as users, where some are cold, and for a floor as for a rung."""
    jobs.run("plant", "wide", {"world": WORLD | {"items": 300}})
    split = jobs.run("prepare", "wide-split", {}, dataset="wide").out.name
    done = jobs.run("baseline", "cold-floor", {"method": "item-knn"}, split=split)
    hits: pa.Table = pq.read_table(done.out / "hits.parquet")
    cold = Split(jobs.folder / "artifacts" / split).popularity[hits["target"].to_numpy()] <= COLD_AT
    assert done.facts["users_cold"] == cold.sum() and 0 < cold.sum() < len(cold)
    expected = ranking_metrics(hits["rank"].to_numpy()[cold])
    for name in ("recall@10", "ndcg@10"):
        assert done.facts[f"{name}_cold"] == pytest.approx(expected[name])
    assert np.isclose(done.facts["recall@10"], ranking_metrics(hits["rank"].to_numpy())["recall@10"])
