"""What a study says of an LLM's input: SIDs of the study's own quantizers, templates, and mistakes with their lines."""

from pathlib import Path

import pytest

from cluster.plan import make_plan
from cluster.study import load_study
from gr.errors import UserError
from tests.cluster.conftest import LLM


@pytest.fixture
def both(study_file: Path) -> Path:
    study_file.write_text(study_file.read_text() + LLM)
    return study_file


def test_sids_of_an_llm_are_those_of_the_sid_ladder(both: Path) -> None:
    plan = make_plan(load_study(both, ["seeds=[0]", "llm.train.input=sids"]))
    (quantize,) = [node for node in plan.nodes.values() if node.stage == "quantize"]
    for stage in ("train_sid", "train_llm", "evaluate_llm"):
        nodes = [node for node in plan.nodes.values() if node.stage == stage]
        assert nodes and all(node.inputs["sids"] == quantize.id for node in nodes)
    (trained,) = [node for node in plan.nodes.values() if node.stage == "train_llm"]
    assert trained.config["input"] == "sids" and not {"encoder", "quantizer", "template"} & trained.config.keys()
    point = next(point for point in plan.points if point.paradigm == "llm")
    assert quantize.id in {node.id for node in plan.upstream(point)}


def test_a_named_quantizer_is_taken(both: Path) -> None:
    more = ["seeds=[0]", "sid.quantizers.other={levels: 3, width: 4}", "llm.train.input=both", "llm.train.quantizer=other"]
    plan = make_plan(load_study(both, more))
    (trained,) = [node for node in plan.nodes.values() if node.stage == "train_llm"]
    assert plan.nodes[trained.inputs["sids"]].config["levels"] == 3
    assert len([node for node in plan.nodes.values() if node.stage == "quantize"]) == 2


def test_defaults_said_aloud_are_no_other_run(both: Path) -> None:
    said = ["llm.train.input=titles", 'llm.train.template="{title}"', "llm.train.attention=sdpa", "llm.train.save_merged=false"]
    quiet, aloud = (make_plan(load_study(both, more)) for more in ([], said))
    assert set(quiet.nodes) == set(aloud.nodes)
    other = make_plan(load_study(both, ['llm.train.template="{title} ({attributes})"']))
    assert len(set(quiet.nodes) - set(other.nodes)) == 4, "training and evaluation of two seeds"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "input: sids, quantizer: rk1",
            r"study.yaml:\d+: llm.train.quantizer: 'rk1' is not among sid.quantizers; did you mean rk",
        ),
        ("input: both, encoder: large", r"study.yaml:\d+: llm.train.encoder: 'large' is not among sid.encoders"),
        ("quantizer: rk", r"llm.train.quantizer: input: titles has no SIDs"),
        ("input: sid", r"llm.train.input: 'sid' is not one of titles, sids, both; did you mean sids"),
        ('template: "{brand}"', r"llm.train.template: '{brand}' has {brand}; an item has {title}, {attributes}, {key}"),
        ('input: sids, template: "{title} {key}"', r"input: sids shows no text"),
    ],
)
def test_mistakes_are_named_with_their_line(both: Path, wrong: str, message: str) -> None:
    both.write_text(both.read_text().replace("train: {lora: {rank: 4},", f"train: {{lora: {{rank: 4}}, {wrong},"))
    with pytest.raises(UserError, match=message):
        load_study(both)


def test_sids_need_the_sid_section(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    head = "study: tiny\ndatasets: {world: {planted: {users: 50, items: 40, topics: 3, communities: 3, subtopics: 3}}}\n"
    path.write_text(head + LLM.replace("train: {lora: {rank: 4},", "train: {lora: {rank: 4}, input: sids,"))
    with pytest.raises(
        UserError, match=r"study.yaml:\d+: llm.train.input: sids needs the SIDs of sid.encoders and sid.quantizers"
    ):
        load_study(path)
