"""`launch: auto` in a study: what each rung gets, and why it can get nothing."""

from pathlib import Path

import pytest
from transformers import Qwen3Config

from cluster.graph import Plan
from cluster.plan import make_plan
from cluster.study import load_study
from gr.errors import UserError

GPU = ["resources.gpus_per_process=1", "resources.gpu_memory=80"]


def llm(rung: str) -> str:
    rates = "optimizer: {steps: 4, global_batch: 32, lr: 0.001}"
    return f"llm={{pretrain: {{{rates}}}, train: {{lora: {{rank: 8}}, {rates}}}, ladder: [{rung}]}}"


def qwen(folder: Path) -> Path:
    """The architecture of a model of 1.7 billion weights and 150,000 tokens, with no weights."""
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "vocab_size": 150_000}
    Qwen3Config(**sizes, num_attention_heads=16, num_key_value_heads=8).save_pretrained(folder / "model")
    return folder / "model"


def plan_of(study_file: Path, *overrides: str) -> Plan:
    return make_plan(load_study(study_file, [*GPU, *overrides]))


def launches(plan: Plan, stage: str) -> set[tuple[int, int]]:
    return {(n.processes, n.launch.get("zero", 0)) for n in plan.nodes.values() if n.stage == stage}


def test_a_rung_that_fits_one_device_is_plain_and_the_same_run_as_without(study_file: Path) -> None:
    small = "name: s, layers: 1, d_model: 16, heads: 1, d_ff: 32"
    auto = plan_of(study_file, "sid.ladder[0].launch=auto", llm(f"{{{small}, launch: auto}}"))
    assert set(auto.nodes) == set(plan_of(study_file, llm(f"{{{small}}}")).nodes)


def test_less_memory_takes_more_devices_and_zero(study_file: Path) -> None:
    """A T5 of 2.6 billion weights: 42 GB of state."""
    wide = "sid.ladder[0]={name: wide, layers: 24, d_model: 2048, heads: 32, d_kv: 64, d_ff: 8192, launch: auto}"
    assert (1, 0) in launches(plan_of(study_file, wide), "train_sid")
    less = launches(plan_of(study_file, wide, "resources.gpu_memory=24"), "train_sid")
    assert any(processes > 1 and zero >= 2 for processes, zero in less), less
    with pytest.raises(UserError, match=r"sid\.ladder\[0\]\.launch: auto: .* don't fit on 2 device\(s\) of 1\.9 GiB"):
        plan_of(study_file, wide, "resources.gpu_memory=2", "resources.gpus_per_machine=2")


def test_both_stages_of_a_fresh_backbone_have_the_rungs_launch(study_file: Path) -> None:
    wide = llm("{name: wide, layers: 28, d_model: 2048, heads: 16, d_ff: 6144, launch: auto}")
    plan = plan_of(study_file, wide, "resources.gpu_memory=24")
    assert max(launches(plan, "pretrain_llm")) == max(launches(plan, "train_llm")) > (1, 0)


def test_an_adapter_of_a_model_from_outside_needs_less_than_training_it_all(study_file: Path, tmp_path: Path) -> None:
    adapter = llm(f"{{name: outside, model: {qwen(tmp_path)}, launch: auto}}")
    plan = plan_of(study_file, adapter, "resources.gpu_memory=32")
    assert (1, 0) in launches(plan, "train_llm")


def test_a_large_vocabulary_makes_micro_batches_small_before_accumulation_does(study_file: Path, tmp_path: Path) -> None:
    """Rows of 512 tokens that predict 150,000 each: 6 are run at once, whose activations fit 48 GB as they are."""
    rates = "optimizer: {steps: 4, global_batch: 64, lr: 0.001}"
    ladder = f"[{{name: outside, model: {qwen(tmp_path)}, launch: auto}}]"
    adapter = f"llm={{train: {{max_tokens: 512, lora: {{rank: 8}}, {rates}}}, ladder: {ladder}}}"
    plan = plan_of(study_file, adapter, "resources.gpu_memory=48")
    assert launches(plan, "train_llm") == {(1, 0)}
    assert {n.launch.get("accumulation", 1) for n in plan.nodes.values() if n.stage == "train_llm"} == {1}


def test_what_it_cannot_choose_by(study_file: Path) -> None:
    with pytest.raises(UserError, match=r"study\.yaml:\d+: sid\.ladder\[0\]\.launch: auto needs resources\.gpus_per_process and"):
        make_plan(load_study(study_file, ["sid.ladder[0].launch=auto"]))
    with pytest.raises(UserError, match=r"llm\.ladder\[0\]\.launch: auto: the sizes of 'no/such-model' can't be read"):
        plan_of(study_file, llm("{name: x, model: no/such-model, launch: auto}"))
