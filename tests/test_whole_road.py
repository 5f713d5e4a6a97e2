"""The whole road with the real jobs, Ray and report: fresh and local pretrained models, a rerun, one more seed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5Model

from gr.text import train_tokenizer
from tests.conftest import ROOT

STUDY = """
study: road
seeds: [0]
datasets:
  planted: {{planted: {{users: 400, items: 80, topics: 8, communities: 6, subtopics: 3, mean_length: 10}}}}
protocols: [leave-one-out, {{temporal: {{val: 0.15, test: 0.15}}}}]
cf: [popularity, markov]
sid:
  encoders: {{local: {{model: {encoder}}}}}
  quantizers: {{rq: {{method: rqvae, levels: 2, width: 8, hidden: [16], latent: 8, steps: 100}}}}
  train: {{max_history: 8, optimizer: {{steps: 20, global_batch: 32, lr: 0.01, validations: 1}}}}
  ladder:
    - {{name: a, layers: 1, d_model: 8, heads: 1, d_kv: 8, d_ff: 16}}
    - {{name: b, layers: 1, d_model: 16, heads: 2, d_kv: 8, d_ff: 32}}
llm:
  train:
    lora: {{share: 0.05}}
    max_history: 4
    max_tokens: 128
    optimizer: {{steps: 10, global_batch: 16, lr: 0.005, validations: 1}}
  ladder:
    - {{name: local, model: {backbone}}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An encoder-decoder and a causal LM as a hub would serve them, with tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["some words of a shop", "Kestrel Camping Lantern"], 300)
    torch.manual_seed(0)
    encoder = T5Model(T5Config(vocab_size=300, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=1))
    backbone = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
        )
    )
    for name, model in (("encoder", encoder), ("backbone", backbone)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "encoder", folder / "backbone"


def grscale(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments], env=environment, capture_output=True, text=True, timeout=500, cwd=ROOT
    )


@pytest.fixture(scope="module")
def road(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Path, str]:
    """The command of a study that has run, its folder, and what it said."""
    folder = tmp_path_factory.mktemp("road")
    study, out = folder / "study.yaml", folder / "out"
    study.write_text(STUDY.format(encoder=models[0], backbone=models[1]))
    run = ("run", str(study), "--out", str(out))
    first = grscale(*run)
    assert first.returncode == 0, first.stdout + first.stderr
    return run, out, first.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)  # with its fixture it is a study, a rerun and a second seed, on a machine that may do other work
def test_from_a_study_file_to_its_report(models: tuple[Path, Path], road: tuple[tuple[str, ...], Path, str]) -> None:
    run, out, first = road
    assert re.search(r"measured .*cf-popularity.* recall@10 0\.\d+", first)
    assert "SID-based GR on planted, leave-one-out: " in first and "index.html" in first
    rows = pq.read_table(out / "metrics").to_pylist()
    assert len(rows) == 2 * (3 + 3) and {row["status"] for row in rows} == {"ok"}
    encoder = sum(p.numel() for p in T5Model.from_pretrained(models[0]).get_encoder().parameters())
    backbone = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(models[1]).parameters())
    for row in rows:
        if row["paradigm"] == "sid":
            assert row["n_llm"] == encoder and row["encoder_init"] == "pretrained"
            assert row["n_total"] == row["n_rs"] + row["n_llm"] + row["n_qt"]
        elif row["paradigm"] == "llm":
            assert row["n_llm"] == backbone and row["init"] == "pretrained"
            assert 0.02 < row["n_lora"] / backbone < 0.1
        assert 0 <= row["recall@1"] <= row["recall@5"] <= row["recall@10"] <= row["recall@20"] <= 1
    users = {p: {row["evaluated_users"] for row in rows if row["protocol"] == p} for p in {row["protocol"] for row in rows}}
    assert all(len(counts) == 1 for counts in users.values()), "one protocol has the same users for everyone"

    files = sorted(path for path in out.joinpath("report").iterdir())
    before = {path: path.read_bytes() for path in files}
    again = grscale(*run)
    assert again.returncode == 0 and "started" not in again.stdout, "nothing was left to do"
    assert {path: path.read_bytes() for path in files} == before

    artifacts = {path: path.stat().st_mtime_ns for path in out.glob("artifacts/*/*/artifact.json")}
    more = grscale(*run, "--set", "seeds=[0, 1]")
    assert more.returncode == 0, more.stdout + more.stderr
    assert {path: path.stat().st_mtime_ns for path in artifacts} == artifacts
    added = sorted(p.parent.parent.name for p in set(out.glob("artifacts/*/*/artifact.json")) - artifacts.keys())
    assert added == sorted(["train_sid", "evaluate_sid"] * 4 + ["train_llm", "evaluate_llm"] * 2)
    assert pq.read_table(out / "metrics").num_rows == len(rows) + 6


@pytest.mark.slow
def test_beam_widths_are_added_to_a_finished_study(road: tuple[tuple[str, ...], Path, str]) -> None:
    """One wider than its 80 items, and one narrower than the metrics look."""
    run, out, _ = road
    measured = {file: file.read_bytes() for file in out.glob("metrics/planted-loo-*-s0-*.parquet")}
    before = set(out.glob("artifacts/*/*/artifact.json"))
    less = [f"--set={change}" for change in ("seeds=[0]", "protocols=[leave-one-out]")]
    wide = [*run, *less, "--set=sid.evaluate={widths: [90]}", "--set=llm.evaluate={widths: [5]}"]
    done = grscale(*wide)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with 90 beams in " in done.stdout and "other beam widths: 3 of 3 done" in done.stdout
    added = set(out.glob("artifacts/*/*/artifact.json")) - before
    assert sorted(path.parent.parent.name for path in added) == ["evaluate_llm", "evaluate_sid", "evaluate_sid"]
    assert {file: file.read_bytes() for file in (out / "metrics").iterdir()} == measured, "the fit has the points it had"
    table = pq.read_table(out / "widths.parquet").to_pylist()
    assert [(r["model"], r["beams"]) for r in table] == [
        ("a", 20), ("a", 90), ("b", 20), ("b", 90), ("local", 5), ("local", 20),
    ]  # fmt: skip
    rows = {(r["run_id"], r["beams"]): r for r in table}
    points = {r["run_id"]: r for r in pq.read_table(out / "metrics").to_pylist()}
    for (run_id, beams), r in rows.items():
        if beams == 20:
            assert all(points[run_id][name] == r[name] for name in ("recall@10", "ndcg@20", "users_per_second", "evaluation"))
        elif beams == 5:
            assert r["recall@5"] > 0 and [r[name] for name in ("recall@10", "ndcg@10", "recall@20", "ndcg@20")] == [None] * 4
        else:  # the whole catalogue: 10 of 90 beams find nothing, and every item is ranked
            assert r["invalid_beams"] == pytest.approx(10 / 90)
            hits = pq.read_table(out / r["evaluation"] / "hits.parquet")["rank"].to_numpy()
            assert hits.min() >= 1 and hits.max() <= 80 and r["infer_flops_per_user"] > rows[run_id, 20]["infer_flops_per_user"]
    page = (out / "report" / "index.html").read_text()
    assert "Beam width" in page and "recall@10 " in page and (out / "report" / "planted-leave-one-out-widths.png").is_file()
    status = grscale("status", str(out), "--json")
    assert list(json.loads(status.stdout)["widths"].values()) == ["done"] * 3
    files = {path: path.read_bytes() for path in (out / "report").iterdir()}
    again = grscale(*wide)
    assert again.returncode == 0 and "started" not in again.stdout, "nothing was left to do"
    assert {path: path.read_bytes() for path in (out / "report").iterdir()} == files
