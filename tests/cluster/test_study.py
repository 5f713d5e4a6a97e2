import re
from pathlib import Path
from typing import get_args

import pytest

from cluster.study import BUILTIN, load_study
from gr.errors import UserError
from jobs.config import Method
from jobs.options import SMALLEST_VOCAB


def refused(file: Path, old: str, new: str, *overrides: str) -> str:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_study(file, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(file), "study.yaml")


@pytest.mark.parametrize("file", sorted(BUILTIN.parent.glob("*.yaml")), ids=lambda p: p.name)
def test_the_studies_that_come_along_are_valid(file: Path) -> None:
    study = load_study(file).study
    assert study.sid and study.cf


CASES = [
    (
        "d_model: 32, heads: 2, d_kv",
        "d_modle: 32, heads: 2, d_kv",
        "study.yaml:15: sid.ladder[1].d_modle: unknown key; did you mean d_model?",
    ),
    (
        "heads: 2, d_ff: 32",
        "heads: 3, d_ff: 32",
        "study.yaml:8: sid.encoders.small.fresh: d_model 16 is not a multiple of heads 3",
    ),
    ("d_ff: 64", "d_ff: many", "study.yaml:15: sid.ladder[1].d_ff: input should be a valid integer"),
    ("d_ff: 64", "d_ff: 0", "study.yaml:15: sid.ladder[1].d_ff: input should be greater than 0, not 0"),
    (", d_ff: 64", "", "study.yaml:15: sid.ladder[1].d_ff: missing"),
    ("items: 40", "itms: 40", "study.yaml:4: datasets.world.planted.itms: unknown key; did you mean items?"),
    (
        "cf: [popularity]",
        "cf: [popularty]",
        "study.yaml:5: cf[0]: 'popularty' is not one of popularity, item-knn, markov, bayes-optimal; did you mean popularity?",
    ),
    ("study: tiny", "study: tiny\nstudy: other", "study.yaml:2: study: written twice, first on line 1"),
    (
        "study: tiny",
        "study: tiny\nprotocols: [{temporal: {vl: .1}}]",
        "study.yaml:2: protocols[0].temporal.vl: unknown key; did you mean val?",
    ),
    (
        "study: tiny",
        "study: tiny\nprotocols: [leave-one-ou]",
        "study.yaml:2: protocols[0]: 'leave-one-ou' is not one of leave-one-out, temporal; did you mean leave-one-out?",
    ),
    ("seeds: [0, 1]", "seeds: [1, 1]", "study.yaml:2: seeds: something is listed twice"),
    ("{name: s,", "{name: xs,", "study.yaml:15: sid.ladder[1].name: 'xs' is there twice"),
    (
        "{name: s,",
        "{name: s, encoder: smal,",
        "study.yaml:15: sid.ladder[1].encoder: 'smal' is not among sid.encoders; did you mean small?",
    ),
    ("{users: 50", "{users: 50, si: 0.9", "study.yaml:4: datasets.world.planted: world: si + cf + noise"),
    ("study: tiny", "study: [tiny", "study.yaml:2: not YAML"),
    ("study: tiny", "study: tiny\n[a, b]: 1", "study.yaml:2: a key is a list; it must be a word"),
    ("{planted: {users", "{? {a: b} : {users", "study.yaml:4: datasets.world: a key is a mapping; it must be a word"),
    (
        "study: tiny",
        "study: tiny\nmetric: recal@10",
        "study.yaml:2: metric: 'recal@10' is not one of recall@1, recall@5, recall@10, recall@20, ndcg@5, ndcg@10, ndcg@20; "
        "did you mean recall@10?",
    ),
    (
        "{name: s,",
        "{name: s, launch: {processes: 3},",
        "study.yaml:15: sid.ladder[1].launch.processes: 3 processes can't share the 8 streams of the data; one of 1, 2, 4, 8",
    ),
    (
        "  ladder:\n",
        "  evaluate: {widths: [50, 20]}\n  ladder:\n",
        "study.yaml:13: sid.evaluate.widths: 20 is what beams says already; widths are further ones",
    ),
    (
        "  ladder:\n",
        "  evaluate: {beams: 30, widths: [50, 50]}\n  ladder:\n",
        "study.yaml:13: sid.evaluate.widths: something is listed twice",
    ),
    (
        "  ladder:\n",
        "  evaluate: {widths: [0]}\n  ladder:\n",
        "study.yaml:13: sid.evaluate.widths[0]: input should be greater than 0, not 0",
    ),
    (
        "  ladder:\n",
        "  evaluate: {beams: 10}\n  ladder:\n",
        "study.yaml:13: sid.evaluate.beams: input should be greater than or equal to 20, not 10",
    ),
    (
        "heads: 2, d_ff: 32,",
        "heads: 2, d_ff: 32, vocab: 258,",
        "study.yaml:8: sid.encoders.small.fresh.vocab: 258 is too small; a byte-level vocabulary has at least 259 tokens",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_mistakes_are_named_with_their_line(study_file: Path, old: str, new: str, message: str) -> None:
    assert refused(study_file, old, new).startswith(message)


LLM = """
llm:
  train: {lora: {rank: 4}, optimizer: {steps: 4, global_batch: 8, lr: 0.001, lr_at_d_model: 64}}
  ladder:
    - {name: xs, RUNG}
"""


@pytest.mark.parametrize(
    ("rung", "message"),
    [
        ("layers: 1, d_model: 32, heads: 2, d_ff: 64", "a fresh backbone needs llm.pretrain"),
        ("layers: 1, heads: 2, d_ff: 64", "a fresh backbone needs d_model"),
        ("layers: 1, d_model: 34, heads: 2, d_ff: 64", "d_model / heads is 17"),
        ("model: some/name, layers: 1", "has both model and sizes"),
        ("model: some/name", "llm.ladder[0].lr: missing"),
    ],
)
def test_mistakes_in_llm_rungs(study_file: Path, rung: str, message: str) -> None:
    study_file.write_text(study_file.read_text() + LLM.replace("RUNG", rung))
    with pytest.raises(UserError, match=re.escape(message)):
        load_study(study_file)


def test_a_vocabulary_without_every_byte(study_file: Path) -> None:
    pretrain = "  pretrain: {vocab: 258, optimizer: {steps: 4, lr: 0.001}}\n  train:"
    rung = "layers: 1, d_model: 32, heads: 2, d_ff: 64"
    study_file.write_text(study_file.read_text() + LLM.replace("  train:", pretrain).replace("RUNG", rung))
    with pytest.raises(UserError, match=r"study.yaml:18: llm.pretrain.vocab: 258 is too small"):
        load_study(study_file)
    load_study(study_file, ["llm.pretrain.vocab=259"])


def test_choices_agree_with_the_code_that_takes_them() -> None:
    from gr.baselines import METHODS
    from gr.text import train_tokenizer

    assert get_args(Method) == (*METHODS, "bayes-optimal")
    assert len(train_tokenizer(["abc"], SMALLEST_VOCAB)) == SMALLEST_VOCAB == len(train_tokenizer(["abc"], 1))


def test_overrides(study_file: Path) -> None:
    study = load_study(study_file, ["seeds=[7]", "sid.ladder[1].lr=0.5", "sid.evaluate.beams=30", "evaluate.users=9"]).study
    assert study.seeds == [7] and study.evaluate.users == 9
    assert study.sid and study.sid.ladder[1].lr == 0.5 and study.sid.evaluate.beams == 30


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sid.train.dropuot=0.1", "--set sid.train.dropuot=0.1: sid.train.dropuot: unknown key; did you mean dropout?"),
        ("sid.ladder[7].lr=1", "--set sid.ladder[7].lr=1: sid.ladder is a list of 2, so there is no sid.ladder[7]"),
        ("sid.ladder[0].lr=-1", "--set sid.ladder[0].lr=-1: sid.ladder[0].lr: input should be greater than 0"),
        ("study.name=x", "--set study.name=x: study has no keys"),
        ("seeds", "--set seeds: write key.path=value"),
        ("seeds=[0", "--set seeds=[0: '[0' is not YAML"),
    ],
)
def test_mistakes_in_overrides(study_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_study(study_file, [override])
    assert str(error.value).startswith(message)
