"""From text to semantic IDs as real processes: sharded and killed encoding, references, probes, collisions to the evaluation."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel

from gr.sid.sids import SidTable
from gr.text import train_tokenizer
from tests.conftest import ROOT, Jobs

TRAINING = {
    "size": {"layers": 1, "d_model": 32, "heads": 2, "d_kv": 16, "d_ff": 64},
    "optimizer": {"steps": 80, "global_batch": 64, "lr": 0.01, "validations": 1},
    "max_history": 10,
    "seed": 3,
}


@pytest.fixture(scope="module")
def slow_encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random encoder, big enough that a run can be killed in the middle of 80 items; in 5 chunks."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer(["Acme Camping Tent Starter Kit Amber"] * 3, 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "batch": 1}


def embeddings(folder: Path) -> Any:
    return pq.read_table(folder / "embeddings.parquet")


def test_an_encoding_that_was_killed_goes_on_and_ends_bitwise_alike(jobs: Jobs, split: str, slow_encoder: dict[str, Any]) -> None:
    whole = jobs.run("encode", "encoded", slow_encoder, split=split)
    path = jobs.write("encode", "killed-encoding", slow_encoder, split=split)
    command, log = jobs.command("encode", path), (jobs.folder / "killed.log").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=jobs.environment(), stdout=log, stderr=log)
    chunks = jobs.folder / "work" / "killed-encoding" / "checkpoint"
    until = time.monotonic() + 240
    while not list(chunks.glob("*/000000.npy")):
        assert process.poll() is None and time.monotonic() < until, Path(log.name).read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(chunks.glob("*/000004.npy")), "it was killed in the middle"
    resumed = jobs.run("encode", "killed-encoding", slow_encoder, split=split)
    event = next(row for row in resumed.rows if row.get("event") == "resumed")
    assert 1 <= event["done"] < event["of"] == 5
    assert embeddings(resumed.out).equals(embeddings(whole.out))
    assert not chunks.exists()


@pytest.mark.slow
def test_two_processes_embed_bitwise_like_one(jobs: Jobs, split: str, slow_encoder: dict[str, Any]) -> None:
    config = slow_encoder | {"pooling": "last", "template": "passage: {title}"}
    one = jobs.run("encode", "encoded-by-one", config, split=split)
    two = jobs.run("encode", "encoded-by-two", config, processes=2, split=split)
    assert embeddings(one.out).equals(embeddings(two.out))
    assert one.facts == two.facts
    default = jobs.run("encode", "encoded-by-default", slow_encoder, split=split)
    assert not embeddings(one.out).equals(embeddings(default.out))


def test_the_semantics_are_what_a_random_vector_lacks(jobs: Jobs, split: str) -> None:
    """On a planted world the classes of an item are known: a title tells two of them, and behaviour alone the third."""
    found = {}
    for name, config in (("tfidf", {"dims": 16}), ("random", {"dims": 16})):
        encoded = jobs.run("encode", f"by-{name}", {name: config}, split=split)
        assert encoded.facts["n_llm"] == 0 and encoded.facts["encoder_init"] == name and encoded.facts["d_embedding"] == 16
        run = jobs.run("quantize", f"codes-{name}", {"levels": 2, "width": 16}, embeddings=f"by-{name}", dataset="planted")
        found[name] = run.facts["probe_factors"]
        r2 = run.facts["probe_embedding_r2"]
        assert len(r2) == 2 and r2[1] < 1 and run.facts["identity_bits"] <= run.facts["identity_bits_of"] == np.log2(80)
    assert found["tfidf"]["topic"]["embedding"] > 0.9 > 0.5 > found["random"]["topic"]["embedding"]
    assert found["tfidf"]["topic"]["sid"] > found["random"]["topic"]["sid"] + 0.2
    assert found["tfidf"]["topic"]["chance"] == pytest.approx(1 / 8, abs=0.03)
    assert found["tfidf"]["community"]["embedding"] < found["tfidf"]["community"]["chance"] + 0.2, "no title tells it"


@pytest.mark.slow
def test_collisions_from_the_quantizer_to_the_recall_of_items(jobs: Jobs, split: str) -> None:
    jobs.run("encode", "for-collisions", {"tfidf": {"dims": 16}}, split=split)
    shape = {"levels": 2, "width": 8}
    runs = {
        policy: jobs.run("quantize", f"sids-{policy}", shape | {"collisions": policy}, embeddings="for-collisions")
        for policy in ("extra-digit", "sinkhorn", "allow")
    }
    before = {run.facts["collision_rate"] for run in runs.values()}
    assert len(before) == 1 and before.pop() > 0.3
    tables = {policy: SidTable.read(run.out / "sids.parquet") for policy, run in runs.items()}
    assert not tables["extra-digit"].shared and not tables["sinkhorn"].shared and tables["allow"].shared
    assert runs["sinkhorn"].facts["collision_rate_before_digit"] < runs["allow"].facts["collision_rate_before_digit"]
    assert runs["sinkhorn"].facts["reconstruction_error_moved"] > runs["sinkhorn"].facts["reconstruction_error"]
    assert runs["allow"].facts["collision_rate_after"] == runs["allow"].facts["collision_rate"]
    for policy, architecture in (("extra-digit", "encoder-decoder"), ("allow", "encoder-decoder"), ("allow", "decoder-only")):
        name = f"{policy}-{architecture}"
        inputs = {"split": split, "sids": f"sids-{policy}"}
        jobs.run("train_sid", f"trained-{name}", TRAINING | {"architecture": architecture}, **inputs)
        facts = jobs.run("evaluate_sid", f"hits-{name}", {}, model=f"trained-{name}", **inputs).facts
        for k in (1, 5, 10, 20):
            assert facts[f"recall@{k}"] <= facts[f"sid_recall@{k}"]
        assert facts["sid_recall@10"] > facts["recall@10"] > 0.15, "better than 10 of 80 items by chance"
        assert ("shared_sids" in facts) == (policy == "allow")


@pytest.mark.slow
def test_mistakes_in_encoders_and_quantizers_are_one_line(jobs: Jobs, split: str, slow_encoder: dict[str, Any]) -> None:
    jobs.run("encode", "of-4-dims", {"random": {"dims": 4}}, split=split)
    for stage, name, config, inputs, words in (
        ("encode", "two", slow_encoder | {"random": {}}, {"split": split}, "give one of them"),
        ("encode", "wide", {"tfidf": {"dims": 5000}}, {"split": split}, "config.tfidf.dims is 5000; 80 texts of"),
        (
            "encode",
            "brace",
            slow_encoder | {"template": "{titel}"},
            {"split": split},
            "template: Value error, '{titel}' has",
        ),
        ("quantize", "parts", {"method": "product", "levels": 5}, {"embeddings": "of-4-dims"}, "config.levels is 5"),
        ("quantize", "ema", {"codebooks": "ema"}, {"embeddings": "of-4-dims"}, "codebooks is an option of method rqvae"),
    ):
        wrong = jobs.run(stage, f"mistake-{name}", config, expect=2, **inputs)
        assert words in wrong.stderr and "Traceback" not in wrong.stderr and not wrong.out.exists()
