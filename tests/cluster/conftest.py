"""Jobs that do nothing but say they did: real run.yaml files, processes and manifests, no training."""

import textwrap
from pathlib import Path

import pytest

from jobs.config import STAGES

ROOT = Path(__file__).resolve().parents[2]

BODY = """
import os, time
from pathlib import Path
from gr.metrics import NDCG_AT, RECALL_AT
from jobs.runtime import RunFailed, main

def body(context):
    with open(os.environ["FAKE_RUNS"], "a") as file:
        file.write(context.run.stage + "-" + context.run.id + "\\n")
    stage, seed = context.run.stage, getattr(context.config, "seed", 0)
    if stage.startswith("train_"):
        context.log(step=1, steps=4, loss=2.5)
    if stage == "train_sid" and seed == 13:
        raise RunFailed("loss is nan at step 3 of 4")
    if stage == "train_sid" and (seed == 99 or seed == 98 and not (context.work / "again").exists()):
        (context.work / "again").touch()
        time.sleep(600)
    if stage == "train_sid" and seed >= 1000:  # until the test lets it end
        until = time.monotonic() + 120
        while not Path(os.environ["FAKE_RUNS"]).with_name("go").exists():
            if time.monotonic() > until:
                raise RunFailed("nobody said go")
            time.sleep(0.1)
    facts = {
        "prepare": {"users": 50, "interactions": 600},
        "encode": {"n_llm": 1000, "encoder_init": "fresh"},
        "quantize": {"n_qt": 100, "collision_rate": 0.25},
        "pretrain_llm": {"n_llm": 700, "loss_val": 9.0, "train_tokens": 1},
        "train_encoder": {"loss_val": 9.0, "train_tokens": 1},
        "train_sid": {"n_rs": 10, "n_non_embedding": 8, "train_tokens": 64, "train_flops": 1e6, "loss_val": 2.0, "init": "fresh",
                      "lr": 1e-3, "lr_choice": "stated", "steps": 4},
        "train_llm": {"n_llm": 700, "n_lora": 7, "loss_val": 3.0, "init": "fresh"},
        "baseline": {"n_cf": 5},
    }.get(stage, {})
    if stage.startswith("evaluate") or stage == "baseline":
        facts |= {f"recall@{k}": 0.01 * k for k in RECALL_AT} | {f"ndcg@{k}": 0.005 * k for k in NDCG_AT}
        facts |= {"evaluated_users": 50, "eval_seconds": 1.0, "users_per_second": 50.0}
    context.facts.update(facts)
    if context.is_main:  # for the others `out` is the finished place, which may not be there yet
        (context.out / "result.txt").write_text(stage)

if __name__ == "__main__":
    main("STAGE", body)
"""

STUDY = """\
study: tiny
seeds: [0, 1]
datasets:
  world: {planted: {users: 50, items: 40, topics: 3, communities: 3, subtopics: 3}}
cf: [popularity]
sid:
  encoders:
    small: {fresh: {layers: 1, d_model: 16, heads: 2, d_ff: 32, optimizer: {steps: 4, global_batch: 8, lr: 0.001}}}
  quantizers:
    rk: {levels: 2, width: 4}
  train:
    optimizer: {steps: 4, global_batch: 8, lr: 0.01, lr_at_d_model: 32}
  ladder:
    - {name: xs, layers: 1, d_model: 16, heads: 1, d_kv: 16, d_ff: 32}
    - {name: s, layers: 1, d_model: 32, heads: 2, d_kv: 16, d_ff: 64}
"""

LLM = """
llm:
  pretrain: {vocab: 300, optimizer: {steps: 4, global_batch: 8, lr: 0.001}}
  train: {lora: {rank: 4}, optimizer: {steps: 4, global_batch: 8, lr: 0.001}}
  ladder: [{name: xs, layers: 1, d_model: 32, heads: 2, d_ff: 64}]
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def fake_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the package `fakejobs` on the path of every process; the file returned has a line per stage that ran."""
    for name, value in write_fake_jobs(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return tmp_path / "runs.txt"


def write_fake_jobs(folder: Path) -> dict[str, str]:
    """Returns the environment that the package `fakejobs` needs; it tells what ran in FOLDER/runs.txt."""
    package = folder / "path" / "fakejobs"
    package.mkdir(parents=True)
    for stage in STAGES:
        (package / f"{stage}.py").write_text(textwrap.dedent(BODY).replace("STAGE", stage))
    (folder / "runs.txt").touch()
    return {"PYTHONPATH": f"{package.parent}:{ROOT}", "FAKE_RUNS": str(folder / "runs.txt")}
