"""The SID paradigm's stages as real processes: the whole chain, two processes, death and resumption, NaN, mistakes."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import equal

from gr.data.dataset import DatasetWriter, Item, User
from gr.data.split import Split
from gr.data.stream import TrainStream
from gr.files import read_json, write_json
from gr.metrics import ranking_metrics
from gr.sid.recommender import t5_flops
from gr.sid.sids import SidTable
from jobs.sid_config import TrainSidConfig
from jobs.sid_recipes import Recipe, recipe
from tests.conftest import ROOT, WORLD, Jobs

SIZE = {"layers": 1, "d_model": 32, "heads": 2, "d_kv": 16, "d_ff": 64}
OPTIMIZER = {"steps": 60, "global_batch": 64, "lr": 0.01, "validations": 3}


def training(**optimizer: Any) -> dict[str, Any]:
    return {"size": SIZE, "dropout": 0.1, "max_history": 10, "optimizer": OPTIMIZER | optimizer, "seed": 3}


@pytest.fixture(scope="module")
def sids(jobs: Jobs, split: str) -> str:
    encoder = {"size": {"layers": 1, "d_model": 32, "heads": 2, "d_ff": 64}, "vocab": 400}
    encoder["optimizer"] = {"steps": 30, "global_batch": 64, "lr": 0.003, "validations": 1}
    jobs.run("train_encoder", "encoder", encoder, split=split)
    jobs.run("encode", "embeddings", {}, split=split, encoder="encoder")
    jobs.run("quantize", "sids", {"levels": 2, "width": 8}, embeddings="embeddings")
    return "sids"


@pytest.fixture(scope="module")
def trained(jobs: Jobs, split: str, sids: str) -> str:
    jobs.run("train_sid", "undisturbed", training(), split=split, sids=sids)
    return "undisturbed"


@pytest.mark.parametrize("architecture", ["encoder-decoder", "decoder-only"])
def test_the_whole_chain_beats_popularity(jobs: Jobs, split: str, sids: str, architecture: str) -> None:
    config = training(steps=250, lr=0.005) | {"architecture": architecture}  # at 0.01 it is near the bound on some processors
    trained = jobs.run("train_sid", f"long-{architecture}", config, split=split, sids=sids)
    evaluated = jobs.run("evaluate_sid", f"evaluated-{architecture}", {}, split=split, sids=sids, model=f"long-{architecture}")
    floor = jobs.run("baseline", "popularity", {"method": "popularity"}, split=split)
    best = jobs.run("baseline", "bayes", {"method": "bayes-optimal"}, split=split, dataset="planted")
    recall = [run.facts["recall@10"] for run in (floor, evaluated, best)]
    assert recall[0] + 0.05 < recall[1] < recall[2] + 0.05, recall
    hits = pq.read_table(evaluated.out / "hits.parquet")
    assert hits.num_rows == 300
    again = ranking_metrics(hits["rank"].to_numpy())
    assert {k: evaluated.facts[k] for k in again} == pytest.approx(again)
    assert trained.facts["n_rs"] > trained.facts["n_non_embedding"] > 0
    assert trained.rows[-1]["step"] == 250


READS = {"user_tokens": 50, "separator": True, "item_position": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "rows", "places"), [("encoder-decoder", "subsequences", 10), ("decoder-only", "last", 11)]
)
def test_the_chain_with_all_that_can_be_read(
    jobs: Jobs, split: str, sids: str, architecture: str, rows: str, places: int
) -> None:
    """Trained, saved, loaded and evaluated; and with other rows, by two processes as by one."""
    name, config = f"reads-{architecture}", training(steps=150, lr=0.005) | READS | {"architecture": architecture, "dropout": 0.0}
    trained = jobs.run("train_sid", name, config, split=split, sids=sids)
    evaluated = jobs.run("evaluate_sid", f"{name}-evaluated", {}, split=split, sids=sids, model=name)
    floor = jobs.run("baseline", "popularity", {"method": "popularity"}, split=split)
    assert evaluated.facts["evaluated_users"] == 300
    assert evaluated.facts["recall@10"] > floor.facts["recall@10"]
    weights = load_file(trained.out / "model.safetensors")
    tables = [
        w.shape for table in ("more", "place") for key, w in weights.items() if key.endswith(f"embed_tokens.{table}.weight")
    ]
    assert tables == [(51, 32), (places, 32)]
    vocab = SidTable.read(jobs.folder / "artifacts" / sids / "sids.parquet").vocab
    assert trained.facts["n_rs"] - trained.facts["n_non_embedding"] == (vocab + 51 + places) * 32
    short = config | {"rows": rows, "optimizer": OPTIMIZER | {"steps": 20}}
    one, two = (jobs.run("train_sid", f"{name}-{n}", short, processes=n, split=split, sids=sids).facts for n in (1, 2))
    assert two["validations"] == [pytest.approx(v, abs=1e-4) for v in one["validations"]]
    assert two["train_tokens"] == one["train_tokens"]


def test_tokens_flops_and_units_of_what_is_trained_on(jobs: Jobs, split: str, sids: str) -> None:
    """Counted from the examples of a step: the user's token, and every item's digits with their separator."""
    data, codes = Split(jobs.folder / "artifacts" / split), SidTable.read(jobs.folder / "artifacts" / sids / "sids.parquet")
    digits, batch = codes.tokens.shape[1], {"seed": 3, "global_batch": 64}

    def made(**given: Any) -> Recipe:
        return recipe(TrainSidConfig(**training() | READS | given), Accelerator(cpu=True), data, codes)

    for rows, unit in (("last", "last"), ("prefixes", "targets"), ("subsequences", "subsequences")):
        stream, trained = TrainStream(data, unit=unit, max_history=10, **batch), made(rows=rows)
        lengths = np.array([1 + len(e.history) * (digits + 1) for e in stream.batch(5)])
        micros = trained.batches(5, 1)
        assert trained.facts["units_per_epoch"] == stream.units
        assert sum(m.weight for m in micros) == 64
        assert sum(m.tokens for m in micros) == lengths.sum() + 64 * digits
        flops = 3 * t5_flops(trained.recommender.config, lengths, digits)
        assert sum(m.flops for m in micros) == pytest.approx(flops, rel=1e-12)
    users = TrainStream(data, unit="users", max_history=10**6, **batch)
    histories = [len(e.history) for e in users.batch(5)]
    trained = {rows: made(architecture="decoder-only", rows=rows) for rows in ("last", "prefixes")}
    last, prefixes = (trained[rows].batches(5, 1) for rows in ("last", "prefixes"))
    assert {r.facts["units_per_epoch"] for r in trained.values()} == {users.units}
    assert sum(m.weight for m in last) == 64 and sum(m.weight for m in prefixes) == sum(histories) - 64
    # Of the last item neither the last digit nor the separator is run.
    assert sum(m.tokens for m in last) == sum(2 + min(n, 11) * (digits + 1) - 2 for n in histories)
    assert sum(m.flops for m in last) < sum(m.flops for m in prefixes)


@pytest.mark.usefixtures("sids")  # which make the embeddings
@pytest.mark.slow
def test_rqvae_codes_the_same_embeddings_repeatably(jobs: Jobs) -> None:
    config = {"method": "rqvae", "levels": 2, "width": 8, "hidden": [32], "latent": 16, "steps": 200}
    first = jobs.run("quantize", "rqvae", config, embeddings="embeddings")
    second = jobs.run("quantize", "rqvae-again", config, embeddings="embeddings")
    assert first.facts == second.facts
    assert pq.read_table(first.out / "sids.parquet").equals(pq.read_table(second.out / "sids.parquet"))
    assert first.facts["reconstruction_error"] < 0.8
    assert min(first.facts["code_use"]) > 0.5


def test_two_processes_train_like_one(jobs: Jobs, split: str, sids: str) -> None:
    """Without dropout (whose random numbers differ by process) the losses agree to float error."""
    config = training(steps=20) | {"dropout": 0.0}
    one = jobs.run("train_sid", "one", config, split=split, sids=sids)
    two = jobs.run("train_sid", "two", config, processes=2, split=split, sids=sids)
    assert two.facts["validations"] == [pytest.approx(v, abs=1e-4) for v in one.facts["validations"]]
    assert two.facts["train_tokens"] == one.facts["train_tokens"]


def start(jobs: Jobs, stage: str, path: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        jobs.command(stage, path, processes),
        cwd=ROOT,
        env=jobs.environment() | {"GRSCALE_CHECKPOINT_SECONDS": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("damage", [False, True])
def test_killed_and_resumed_ends_bitwise_like_undisturbed(jobs: Jobs, split: str, sids: str, trained: str, damage: bool) -> None:
    name = f"killed-{damage}"
    path = jobs.write("train_sid", name, training(), split=split, sids=sids)
    process = start(jobs, "train_sid", path)
    checkpoints = jobs.folder / "work" / name / "checkpoint"
    wait_for(checkpoints / "000000025", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    aside = [p for p in (jobs.folder / "artifacts").iterdir() if p.name.startswith(f".{name}.")]
    assert len(aside) == 1, "what it had half-written"
    newest = max(checkpoints.glob("[0-9]*"))
    if damage:
        weights = newest / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-7])
    resumed = jobs.run("train_sid", name, training(), split=split, sids=sids)
    steps = [row["step"] for row in resumed.rows if row.get("event") == "resumed"]
    assert len(steps) == 1 and (steps[0] < int(newest.name) if damage else steps[0] == int(newest.name))
    assert ("is damaged" in resumed.stderr) == damage
    one, other = (load_file(jobs.folder / "artifacts" / n / "model.safetensors") for n in (trained, name))
    assert one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    assert not checkpoints.exists() and not aside[0].exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_killed_launcher_leaves_no_rank_and_its_processes_resume_bitwise(
    jobs: Jobs, split: str, sids: str, processes: int
) -> None:
    """A sum of two depends on no order; of four it does, and so on how DDP lays out its buckets."""
    calm, killed = f"{processes}-undisturbed", f"{processes}-killed"
    jobs.run("train_sid", calm, training(), processes=processes, split=split, sids=sids)
    path = jobs.write("train_sid", killed, training(), processes=processes, split=split, sids=sids)
    launcher = start(jobs, "train_sid", path, processes=processes)
    wait_for(jobs.folder / "work" / killed / "checkpoint" / "000000025", launcher)
    kill_launcher(launcher, processes)
    jobs.run("train_sid", killed, training(), processes=processes, split=split, sids=sids)
    one, other = (load_file(jobs.folder / "artifacts" / n / "model.safetensors") for n in (calm, killed))
    assert all(equal(one[k], other[k]) for k in one)


def kill_launcher(launcher: subprocess.Popen[bytes], processes: int) -> None:
    """kill -9; none of its ranks may live on."""
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks) == processes
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    for rank in alive:
        rank.kill()
    assert not alive


@pytest.mark.slow
def test_a_killed_launcher_of_one_process_leaves_none(jobs: Jobs, split: str, sids: str) -> None:
    """As the README has it typed; for one process accelerate's launcher sets no WORLD_SIZE."""
    path = jobs.write("train_sid", "launched", training(steps=10**6), split=split, sids=sids)
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launcher = subprocess.Popen(
        [accelerate, "launch", "-m", "jobs.train_sid", str(path)],
        cwd=ROOT,
        env=jobs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(jobs.folder / "work" / "launched" / "metrics.jsonl", launcher)
    kill_launcher(launcher, 1)


def test_one_process_at_a_time_works_in_a_folder(jobs: Jobs) -> None:
    work = jobs.folder / "work" / "locked"
    work.mkdir(parents=True)
    with (work / ".lock").open("w") as lock:
        lock.write("process 7 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = jobs.run("plant", "locked", {"world": WORLD}, expect=2)
        assert f"{work}: process 7 on elsewhere works here; wait for it or stop it" in refused.stderr
        assert not (work / "failure.json").exists(), "it would be the other's"
        # One that was just killed is not gone at once.
        threading.Timer(2.0, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        done = jobs.run("plant", "locked", {"world": WORLD})
    write_json(work / "failure.json", {"reason": "an older try"})
    jobs.run("plant", "locked", {"world": WORLD})
    assert done.out.is_dir() and not (work / "failure.json").exists()


def run_as(jobs: Jobs, path: Path, **keys: Any) -> subprocess.CompletedProcess[str]:
    """Runs a `plant` with other keys in its run.yaml; what it says on stderr is one line and no traceback."""
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))
    done = subprocess.run(jobs.command("plant", path), cwd=ROOT, env=jobs.environment(), capture_output=True, text=True)
    assert done.stderr.count("\n") == (done.returncode != 0), done.stderr
    return done


def test_out_replaces_nothing_but_an_empty_folder(jobs: Jobs) -> None:
    home = jobs.folder / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "thesis.tex").write_text("years of work")
    (home / "notes.txt").write_text("too")
    path = jobs.write("plant", "home/run", {"world": WORLD})
    for out in ("thesis", "notes.txt"):
        taken = run_as(jobs, path, out=out, work="../aside/out")
        assert taken.returncode == 2 and f"out: {home / out} is there and no finished artifact" in taken.stderr
    for out, what in ((".", "run.yaml itself"), ("..", "run.yaml itself"), ("artifact", "work"), ("artifact/deep", "work")):
        holds = run_as(jobs, path, out=out, work="artifact/deep")
        assert holds.returncode == 2 and f"would hold {what}; the artifact needs a folder of its own" in holds.stderr
    assert sorted(p.name for p in home.rglob("*")) == ["notes.txt", "run.yaml", "thesis", "thesis.tex"]
    (home / "empty").mkdir()
    assert run_as(jobs, path, out="empty", work="../aside/out").returncode == 0
    assert (home / "empty" / "artifact.json").is_file()


def test_only_what_trains_takes_several_processes(jobs: Jobs) -> None:
    path = jobs.write("plant", "twice", {"world": WORLD}, processes=2)
    for rank in ("0", "1"):
        environment = jobs.environment() | {"WORLD_SIZE": "2", "RANK": rank}
        done = subprocess.run(jobs.command("plant", path), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "launch.processes is 2; stage plant is done by one process" in done.stderr
    assert not (jobs.folder / "artifacts" / "twice").exists()


@pytest.mark.slow
def test_another_configuration_takes_up_neither_checkpoint_nor_artifact(jobs: Jobs, split: str, sids: str, trained: str) -> None:
    other = jobs.run("train_sid", trained, training(lr=0.02), expect=2, split=split, sids=sids)
    assert "holds the result of another run (config.optimizer was" in other.stderr
    path = jobs.write("train_sid", "begun", training(), split=split, sids=sids)
    process = start(jobs, "train_sid", path)
    wait_for(jobs.folder / "work" / "begun" / "checkpoint" / "000000005", process)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert not [p for p in (jobs.folder / "artifacts").iterdir() if p.name.startswith(".begun")], "nothing half-written"
    changed = jobs.run("train_sid", "begun", training(steps=70), expect=2, split=split, sids=sids)
    assert "a checkpoint of another run (config.optimizer was" in changed.stderr


def test_a_loss_that_is_no_number_ends_the_run_with_its_reason(jobs: Jobs, split: str, sids: str) -> None:
    run = jobs.run("train_sid", "diverging", training(lr=1e30), expect=1, split=split, sids=sids)
    assert "loss is nan at step" in run.stderr or "loss is inf at step" in run.stderr
    assert "of 60" in (run.work / "failure.json").read_text()
    assert not run.out.exists()


@pytest.mark.slow
def test_mistakes_are_one_line_and_exit_2(jobs: Jobs, split: str, sids: str) -> None:
    wrong_key = jobs.run("train_sid", "wrong", training() | {"drop_out": 1}, expect=2, split=split, sids=sids)
    assert "config: drop_out" in wrong_key.stderr and "Traceback" not in wrong_key.stderr
    rows = training() | {"rows": "subsequences", "architecture": "decoder-only"}
    refused = jobs.run("train_sid", "wrong", rows, expect=2, split=split, sids=sids)
    assert "rows: subsequences is for architecture: encoder-decoder" in refused.stderr and refused.stderr.count("\n") == 1
    missing = jobs.run("train_sid", "missing", training(), expect=2, split=split, sids="nowhere")
    assert "inputs.sids" in missing.stderr and "Traceback" not in missing.stderr
    for config, word in (({}, "either"), ({"model": "no/such-model"}, "can't be loaded as an encoder")):
        wrong_model = jobs.run("encode", "no-encoder", config, expect=2, split=split)
        assert word in wrong_model.stderr and "Traceback" not in wrong_model.stderr
    path = jobs.write("train_sid", "processes", training(), processes=2, split=split, sids=sids)
    done = subprocess.run(jobs.command("train_sid", path), cwd=ROOT, env=jobs.environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "launch.processes is 2, but 1 process(es) were started" in done.stderr


def test_a_run_yaml_or_folder_that_can_not_be_used_is_one_line_and_exit_2(jobs: Jobs) -> None:
    path = jobs.write("plant", "unusable", {"world": WORLD})
    (jobs.folder / "file").write_text("where a folder would have to be")
    for key in ("work", "out"):
        done = run_as(jobs, path, **{"work": "work/unusable", "out": "artifacts/unusable", key: "file/below/it"})
        assert done.returncode == 2 and f"run.yaml: {key}: " in done.stderr and "name another folder" in done.stderr
    path.write_bytes(path.read_bytes() + b"# caf\xe9\n")
    done = subprocess.run(jobs.command("plant", path), cwd=ROOT, env=jobs.environment(), capture_output=True, text=True)
    assert done.returncode == 2 and f"{path}: 'utf-8' codec can't decode byte" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_inputs_of_another_stage_or_without_their_file_are_named(jobs: Jobs, split: str, sids: str, trained: str) -> None:
    wrong = jobs.run("train_sid", "wrong-sids", training(), expect=2, split=split, sids="embeddings")
    assert "embeddings is of stage encode; it has to be one of quantize" in wrong.stderr and "Traceback" not in wrong.stderr
    wrong = jobs.run("evaluate_sid", "wrong-model", {}, expect=2, split=split, sids=sids, model="sids")
    assert "sids is of stage quantize; it has to be one of train_sid" in wrong.stderr and "Traceback" not in wrong.stderr
    (jobs.folder / "artifacts" / "hollow").mkdir()
    hollow = jobs.run("quantize", "no-file", {}, expect=2, embeddings="hollow")
    assert "hollow has no embeddings.parquet; encode writes one" in hollow.stderr and "Traceback" not in hollow.stderr
    torn = jobs.folder / "artifacts" / "torn"
    shutil.copytree(jobs.folder / "artifacts" / trained, torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:500])
    damaged = jobs.run("evaluate_sid", "damaged", {}, expect=2, split=split, sids=sids, model="torn")
    assert "torn: can't be loaded as a SID recommender" in damaged.stderr and "Traceback" not in damaged.stderr


@pytest.mark.slow
def test_evaluation_takes_only_what_the_model_was_trained_with(jobs: Jobs, split: str, sids: str, trained: str) -> None:
    for name in (split, sids):
        folder = jobs.folder / "artifacts" / f"other-{name}"
        shutil.copytree(jobs.folder / "artifacts" / name, folder)
        write_json(folder / "artifact.json", read_json(folder / "artifact.json") | {"id": folder.name})
        inputs = {"split": split, "sids": sids, name: folder.name}
        other = jobs.run("evaluate_sid", f"with-{folder.name}", {}, expect=2, model=trained, **inputs)
        assert f"inputs.{name} is other-{name}, but inputs.model was trained with {name}" in other.stderr


def test_a_model_in_config_is_relative_to_run_yaml(jobs: Jobs, split: str, sids: str) -> None:
    assert sids, "made from the encoder's artifact"
    by_path = jobs.run("encode", "by-path", {"model": "artifacts/encoder", "max_tokens": 100}, split=split)
    tables = [pq.read_table(folder / "embeddings.parquet") for folder in (by_path.out, jobs.folder / "artifacts" / "embeddings")]
    assert tables[0].equals(tables[1])


def test_a_finished_run_is_not_done_again(jobs: Jobs, split: str, sids: str, trained: str) -> None:
    before = (jobs.folder / "artifacts" / trained / "artifact.json").stat().st_mtime_ns
    jobs.run("train_sid", trained, training(), split=split, sids=sids)
    assert (jobs.folder / "artifacts" / trained / "artifact.json").stat().st_mtime_ns == before


def test_the_best_reachable_recall_is_of_the_world_that_was_split(jobs: Jobs, split: str) -> None:
    world = {"users": 30, "items": 80, "topics": 8, "communities": 6, "subtopics": 3, "mean_length": 10, "seed": 1}
    jobs.run("plant", "other-world", {"world": world})
    wrong = jobs.run("baseline", "wrong-bayes", {"method": "bayes-optimal"}, expect=2, split=split, dataset="other-world")
    assert "is not the data set that inputs.split was made from" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not wrong.out.exists()


def test_a_dataset_imported_again_is_another_input(jobs: Jobs) -> None:
    """Its folder is no artifact with an id; its path stays the same."""
    for length in (5, 5, 6):
        with DatasetWriter(jobs.folder / "artifacts" / "outside", "outside", {}, [Item("a")]) as writer:
            for user in range(9):
                writer.add(User(str(user), [0] * length, list(range(length))))
        done = jobs.run("prepare", "of-outside", {}, expect=0 if length == 5 else 2, dataset="outside")
    assert "holds the result of another run (inputs were" in done.stderr
