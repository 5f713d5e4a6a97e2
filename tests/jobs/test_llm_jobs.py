"""The LLM paradigm's stages as real processes: the whole chain, two processes, death and resumption, mistakes."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gr.data.dataset import DatasetWriter, Item, User
from gr.files import read_json, read_object, write_json
from gr.metrics import ranking_metrics
from jobs.config import Run
from jobs.llm_config import TrainLlmConfig
from jobs.pretrain_llm import shape
from jobs.runtime import Context
from jobs.train_llm import backbone_source
from tests.conftest import ROOT, Jobs

PRETRAIN = {
    "size": {"layers": 2, "d_model": 32, "heads": 2, "d_ff": 64},
    "vocab": 320,
    "optimizer": {"steps": 60, "global_batch": 64, "lr": 0.005, "validations": 2},
}
OPTIMIZER = {"steps": 40, "global_batch": 16, "lr": 0.005, "validations": 2}


def training(**optimizer: Any) -> dict[str, Any]:
    return {"lora": {"rank": 16}, "max_history": 8, "max_tokens": 256, "optimizer": OPTIMIZER | optimizer, "seed": 3}


@pytest.fixture(scope="module")
def backbone(jobs: Jobs, split: str) -> str:
    jobs.run("pretrain_llm", "backbone", PRETRAIN, split=split)
    return "backbone"


@pytest.fixture(scope="module")
def trained(jobs: Jobs, split: str, backbone: str) -> str:
    jobs.run("train_llm", "llm", training(), split=split, backbone=backbone)
    return "llm"


def test_the_backbone_is_an_ordinary_hugging_face_folder(jobs: Jobs, backbone: str) -> None:
    folder = jobs.folder / "artifacts" / backbone
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3" and model.config.vocab_size == len(tokenizer)
    assert model.config.tie_word_embeddings


@pytest.mark.slow
def test_the_whole_chain_beats_popularity(jobs: Jobs, split: str, backbone: str) -> None:
    jobs.run("train_llm", "llm-long", training(steps=250), split=split, backbone=backbone)
    evaluated = jobs.run("evaluate_llm", "llm-evaluated", {}, split=split, backbone=backbone, model="llm-long")
    floor = jobs.run("baseline", "llm-popularity", {"method": "popularity"}, split=split)
    assert evaluated.facts["recall@10"] > floor.facts["recall@10"] + 0.03
    hits = pq.read_table(evaluated.out / "hits.parquet")
    again = ranking_metrics(hits["rank"].to_numpy())
    assert {k: evaluated.facts[k] for k in again} == pytest.approx(again)


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "start"), [("full", "random"), ("head", "trained"), ("lora", "random")])
def test_other_parts_of_a_backbone_are_trained_and_evaluated(
    jobs: Jobs, split: str, backbone: str, tune: str, start: str
) -> None:
    config = training(steps=60) | {"tune": tune, "start": start}
    if tune != "lora":
        del config["lora"]
    name = f"llm-{tune}-{start}"
    trained = jobs.run("train_llm", name, config, split=split, backbone=backbone)
    assert trained.facts["init"] == ("random" if start == "random" else "fresh") and trained.facts["tune"] == tune
    assert (trained.facts["n_lora"] == 0) == (tune != "lora")
    validations = [loss for _, loss in trained.facts["validations"]]
    evaluated = jobs.run("evaluate_llm", f"{name}-evaluated", {"users": 60}, split=split, backbone=backbone, model=name)
    assert evaluated.facts["evaluated_users"] == 60 and validations[-1] < validations[0]


@pytest.mark.slow
def test_facts_and_policies(jobs: Jobs, split: str, backbone: str, trained: str) -> None:
    facts = jobs.run("evaluate_llm", "expand", {"users": 50}, split=split, backbone=backbone, model=trained).facts
    assert facts["evaluated_users"] == 50 and facts["infer_flops_per_user"] > 0
    assert {"shared_titles", "empty_titles", "truncated_titles"} <= facts.keys()
    other = jobs.folder / "artifacts" / "other-backbone"
    shutil.copytree(jobs.folder / "artifacts" / backbone, other)
    write_json(other / "artifact.json", read_json(other / "artifact.json") | {"id": other.name})
    wrong = jobs.run("evaluate_llm", "wrong", {"users": 50}, expect=2, split=split, backbone=other.name, model=trained)
    assert "inputs.backbone is other-backbone, but inputs.model was trained with backbone" in wrong.stderr


@pytest.mark.slow
def test_twins_are_one_under_merge_and_rank_one_after_the_other_under_expand(jobs: Jobs) -> None:
    """Two titles of ten items each: a model ranks two titles, and where it puts an item depends on the policy alone."""
    rng = np.random.default_rng(0)
    items = [Item(f"k{i}", ("red lamp", "blue chair")[i % 2]) for i in range(20)]
    with DatasetWriter(jobs.folder / "artifacts" / "twins", "twins", {}, items) as writer:
        for user in range(60):
            writer.add(User(str(user), rng.choice(20, 6, replace=False).tolist(), list(range(6))))
    jobs.run("prepare", "twins-split", {}, dataset="twins")
    pretrain = PRETRAIN | {"optimizer": PRETRAIN["optimizer"] | {"steps": 4}}
    jobs.run("pretrain_llm", "twins-backbone", pretrain, split="twins-split")
    inputs, ranks = {"split": "twins-split", "backbone": "twins-backbone"}, {}
    for policy in ("merge", "expand"):
        trained = jobs.run("train_llm", f"twins-{policy}", training(steps=4) | {"shared_titles": policy}, **inputs)
        done = jobs.run("evaluate_llm", f"twins-{policy}d", {}, model=trained.out.name, **inputs)
        assert done.facts["shared_titles_policy"] == policy and done.facts["items_with_shared_title"] == 20
        ranks[policy] = pq.read_table(done.out / "hits.parquet")["rank"].to_numpy()
        assert done.facts["recall@5"] == pytest.approx((ranks[policy] <= 5).mean())
    assert set(ranks["merge"]) == {1, 2} and len(set(ranks["expand"])) > 10
    assert (ranks["merge"] == (ranks["expand"] - 1) // 10 + 1).all()


@pytest.mark.slow
def test_two_processes_train_the_same_model(jobs: Jobs, split: str, backbone: str, trained: str) -> None:
    two = jobs.run("train_llm", "llm-two", training(), processes=2, split=split, backbone=backbone)
    one = load_file(jobs.folder / "artifacts" / trained / "adapter_model.safetensors")
    other = load_file(two.out / "adapter_model.safetensors")
    assert one.keys() == other.keys()
    assert all((one[k] - other[k]).abs().max() < 2e-2 for k in one)
    assert two.facts["train_tokens"] == jobs_facts(jobs, trained)["train_tokens"]


@pytest.mark.slow
def test_killed_training_ends_like_an_undisturbed_one(jobs: Jobs, split: str, backbone: str) -> None:
    config = training(steps=150)
    jobs.run("train_llm", "calm", config, split=split, backbone=backbone)
    path = jobs.write("train_llm", "killed", config, split=split, backbone=backbone)
    environment = jobs.environment() | {"GRSCALE_CHECKPOINT_SECONDS": "0.2"}
    process = subprocess.Popen(jobs.command("train_llm", path), cwd=ROOT, env=environment, start_new_session=True)
    checkpoints = jobs.folder / "work" / "killed" / "checkpoint"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("[0-9]*/checkpoint.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = jobs.run("train_llm", "killed", config, split=split, backbone=backbone)
    assert any(row.get("event") == "resumed" for row in done.rows)
    calm, resumed = (read_object(folder / "artifact.json")["files"] for folder in (jobs.folder / "artifacts" / "calm", done.out))
    assert "adapter_model.safetensors" in calm and calm == resumed, "the same checksums, of the configuration too"
    base = Path(read_object(done.out / "adapter_config.json")["base_model_name_or_path"])
    assert not base.is_absolute() and (done.out / base).resolve() == (jobs.folder / "artifacts" / backbone).resolve()


@pytest.mark.slow
def test_mistakes_are_named(jobs: Jobs, split: str) -> None:
    assert "inputs.backbone is missing" in jobs.run("train_llm", "none", training(), expect=2, split=split).stderr
    small = PRETRAIN | {"vocab": 100}
    assert "vocab: Value error, 100 is too small" in jobs.run("pretrain_llm", "small", small, expect=2, split=split).stderr
    tight = PRETRAIN | {"max_tokens": 8}
    assert "config.max_tokens is 8" in jobs.run("pretrain_llm", "tight", tight, expect=2, split=split).stderr


@pytest.mark.parametrize("max_tokens", [64, 256])
@pytest.mark.parametrize("mean_tokens", [3.0, 11.5, 40.0])
def test_every_process_gets_a_document(max_tokens: int, mean_tokens: float) -> None:
    for batch in range(8, 520, 8):
        documents, length = shape(batch, max_tokens, mean_tokens)
        assert documents >= 8 and length >= 2 and documents * length >= batch
        if batch >= 16:
            assert documents == -(-batch // length), "no more than the batch asks for"


def test_a_model_in_config_is_relative_to_run_yaml(tmp_path: Path) -> None:
    config = TrainLlmConfig.model_validate(training() | {"model": "models/mine"})
    run = Run(stage="train_llm", id="x", out=Path("out"), work=Path("work"))
    context = Context(run, config, tmp_path)
    assert backbone_source(context, config.model) == "models/mine", "a hub's name"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert backbone_source(context, config.model) == str(tmp_path / "models" / "mine")


def jobs_facts(jobs: Jobs, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = read_json(jobs.folder / "artifacts" / name / "artifact.json")["facts"]
    return facts
