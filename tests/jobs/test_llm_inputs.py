"""An LLM that reads and generates semantic IDs, or reads attributes: the chain as real processes, resumption, mistakes."""

from typing import Any

import pyarrow.parquet as pq
import pytest
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import equal
from transformers import AutoModelForCausalLM, AutoTokenizer

from gr.metrics import ranking_metrics
from jobs.llm_config import TrainLlmConfig
from tests.conftest import Jobs
from tests.jobs.launching import launch
from tests.jobs.test_llm_jobs import PRETRAIN, training


@pytest.fixture(scope="module")
def backbone(jobs: Jobs, split: str) -> str:
    jobs.run("pretrain_llm", "inputs-backbone", PRETRAIN | {"checkpoint_activations": True}, split=split)
    return "inputs-backbone"


@pytest.fixture(scope="module")
def sids(jobs: Jobs, split: str) -> str:
    jobs.run("encode", "inputs-embeddings", {"tfidf": {"dims": 16}}, split=split)
    jobs.run("quantize", "inputs-sids", {"levels": 2, "width": 8}, embeddings="inputs-embeddings")
    return "inputs-sids"


def config(kind: str, **more: Any) -> dict[str, Any]:
    return training(**more.pop("optimizer", {})) | {"input": kind, **more}


@pytest.mark.slow
def test_semantic_ids_are_generated_and_ranked(jobs: Jobs, split: str, backbone: str, sids: str) -> None:
    options = {"save_merged": True, "checkpoint_activations": True, "prompt": "bought:"}
    trained = jobs.run("train_llm", "llm-sids", config("sids", **options), split=split, backbone=backbone, sids=sids)
    facts = trained.facts
    digits = pq.read_table(jobs.folder / "artifacts" / sids / "sids.parquet")["codes"].to_pylist()
    used = sum(len({code[level] for code in digits}) for level in range(3))
    assert facts["input"] == "sids" and facts["new_tokens"] == used
    assert facts["n_trained"] == facts["n_lora"] + used * 32, "and the rows of the new tokens, tied"
    validations = [loss for _, loss in facts["validations"]]
    assert validations[-1] < validations[0]
    done = jobs.run("evaluate_llm", "llm-sids-ed", {"users": 60}, split=split, backbone=backbone, sids=sids, model="llm-sids")
    assert done.facts["invalid_beams"] == 0 and done.facts["shared_titles_policy"] == "expand"
    ranks = pq.read_table(done.out / "hits.parquet")["rank"].to_numpy()
    assert done.facts["recall@10"] == pytest.approx(ranking_metrics(ranks)["recall@10"])
    words = AutoTokenizer.from_pretrained(trained.out)
    plain = AutoModelForCausalLM.from_pretrained(jobs.folder / "artifacts" / backbone)
    plain.resize_token_embeddings(len(words))
    opened = PeftModel.from_pretrained(plain, str(trained.out)).eval()
    merged = AutoModelForCausalLM.from_pretrained(trained.out / "merged").eval()
    ids = words("<a_0><b_1><c_0>", return_tensors="pt")["input_ids"]
    assert (opened(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tune", "start"),
    [
        ("lora", "trained"),
        pytest.param("full", "trained", marks=pytest.mark.long),
        pytest.param("lora", "random", marks=pytest.mark.long),
    ],
)
def test_titles_with_attributes_and_semantic_ids(jobs: Jobs, split: str, backbone: str, sids: str, tune: str, start: str) -> None:
    name = f"llm-both-{tune}-{start}"
    options: dict[str, Any] = {"template": "{title} ({attributes})", "tune": tune, "start": start}
    given = config("both", **options) | ({"lora": None} if tune == "full" else {})
    trained = jobs.run("train_llm", name, given, split=split, backbone=backbone, sids=sids)
    assert trained.facts["cut_attributes"] == 0 and trained.facts["new_tokens"] > 0
    done = jobs.run("evaluate_llm", f"{name}-ed", {"users": 40}, split=split, backbone=backbone, sids=sids, model=name)
    assert done.facts["evaluated_users"] == 40


@pytest.mark.slow
@pytest.mark.long  # a minute, of which the whole suite has none left
def test_zero_3_trains_the_same_and_saves_whole_weights(jobs: Jobs, split: str, sids: str) -> None:
    """Its weights are large enough to be shared out; the rows of new tokens are among them, and the frozen ones are saved too."""
    wide = PRETRAIN | {"size": {"layers": 1, "d_model": 384, "heads": 2, "d_ff": 768}, "optimizer": {"steps": 2, "lr": 0.001}}
    jobs.run("pretrain_llm", "inputs-wide", wide, split=split)
    small = config("both", optimizer={"steps": 6, "lr": 0.0005, "validations": 3}, start="random", save_merged=True)
    inputs = {"split": split, "backbone": "inputs-wide", "sids": sids}
    one = launch(jobs, "train_llm", "wide-one", small, {}, **inputs)
    two = launch(jobs, "train_llm", "wide-zero3", small, {"processes": 2, "zero": 3}, **inputs)
    a, b = (load_file(run.out / "adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and any("trainable_tokens" in key for key in a)
    assert all((a[key] - b[key]).abs().max() < 2e-3 for key in a)
    a, b = (load_file(run.out / "backbone" / "model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    ids = AutoTokenizer.from_pretrained(two.out)("<a_0><b_1><c_0>", return_tensors="pt")["input_ids"]
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(two.out / "backbone"), str(two.out)).eval()
    merged = AutoModelForCausalLM.from_pretrained(two.out / "merged").eval()
    assert (opened(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() < 1e-3


@pytest.mark.slow
def test_mistakes_are_one_line(jobs: Jobs, split: str, backbone: str, sids: str) -> None:
    def said(given: dict[str, Any], **inputs: str) -> str:
        done = jobs.run("train_llm", "llm-mistake", given, expect=2, split=split, backbone=backbone, **inputs)
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "inputs.sids is missing; stage train_llm needs it" in said(config("sids"))
    assert "inputs.sids is given, but config.input is titles" in said(training(), sids=sids)
    assert "flash_attention_2 needs" in said(training() | {"attention": "flash_attention_2"})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"template": "{title} {brand}"}, r"'{title} {brand}' has {brand}; an item has {title}, {attributes}, {key}"),
        ({"template": "{title} {title.__class__}"}, r"has {title.__class__}; an item has"),
        ({"template": "{title} {attributes[0]}"}, r"has {attributes\[0\]}; an item has"),
        ({"template": "{title!r}"}, r"has {title}; an item has"),
        ({"template": "{title:>99999999}"}, r"has {title}; an item has"),
        ({"template": "{attributes}: {title}"}, r"does not begin with {title}: an item begins with what is generated of it"),
        ({"template": "{title} {"}, r"a brace that is meant as one is written twice"),
        ({"template": "{title} ({attributes})", "input": "sids"}, r"input: sids shows no text"),
        ({"tune": "head", "lora": None, "input": "both"}, r"would leave the new tokens of input: both as they were drawn"),
        ({"tune": "full", "lora": None, "save_merged": True}, r"save_merged goes with tune: lora"),
        ({"load_in_4bit": True, "start": "random"}, r"load_in_4bit and start: random"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainLlmConfig.model_validate(training() | wrong)
