from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.graph import Plan
from cluster.measure import SCHEMA, WIDTHS, read_row, refresh_rows
from cluster.plan import make_plan
from cluster.store import Store
from cluster.study import load_study
from tests.cluster import test_schedule
from tests.cluster.conftest import LLM
from tests.cluster.test_schedule import run_all

COLUMNS = """study run_id dataset protocol paradigm model seed n_rs n_llm n_qt n_lora n_cf n_total n_non_embedding users
interactions train_tokens train_flops infer_flops_per_user train_seconds eval_seconds users_per_second peak_memory_bytes loss_val
recall@1 recall@5 recall@10 recall@20 ndcg@5 ndcg@10 ndcg@20 inject data_fraction status""".split()  # noqa: SIM905


@pytest.fixture
def measured(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, Store]:
    study_file.write_text(study_file.read_text() + LLM)
    plan, store = make_plan(load_study(study_file, ["seeds=[3]"])), Store(tmp_path / "out")
    store.prepare(plan, {"study": "tiny", "datasets": {}})
    facts = {
        "prepare": {"users": 50, "interactions": 600},
        "train_encoder": {"loss_val": 9.0, "train_tokens": 9, "n_rs": 999},
        "encode": {"n_llm": 1000, "encoder_init": "fresh"},
        "quantize": {"n_qt": 100, "collision_rate": 0.25},
        "train_sid": {"n_rs": 10, "loss_val": 2.0, "train_tokens": 64, "lr": 0.5, "lr_choice": "stated", "init": "fresh"},
        "pretrain_llm": {"n_llm": 5, "loss_val": 8.0},
        "train_llm": {"n_llm": 700, "n_lora": 7, "loss_val": 3.0, "init": "fresh"},
        "evaluate_llm": {
            **test_schedule.RECALL,
            "shared_titles_policy": "expand",
            "title_score": "mean of tokens' log-probabilities over the catalogue",
            "users_cold": 12,
            "recall@10_cold": 0.25,
            "ndcg@10_cold": 0.125,
            "items_with_shared_title": 4,
            "empty_titles": 1,
            "truncated_titles": 2,
        },
        "baseline": {
            "n_cf": 5,
            **test_schedule.RECALL,
            **{f"expected_recall@{k}": k / 100 for k in (1, 5, 10, 20)},
            "device": "cpu",
            "peak_memory_bytes": 9,
        },
    }
    monkeypatch.setattr(test_schedule, "FACTS", facts)
    run_all(plan, store)
    return plan, store


def rows(measured: tuple[Plan, Store]) -> dict[str, dict[str, object]]:
    plan, store = measured
    return {point.paradigm + point.model: read_row(store.row(point)) for point in plan.points}


def test_columns_are_those_that_other_tools_rely_on() -> None:
    assert SCHEMA.names[: len(COLUMNS)] == COLUMNS


def test_each_number_comes_from_its_own_stage(measured: tuple[Plan, Store]) -> None:
    sid = rows(measured)["sidxs"]
    assert {k: sid[k] for k in ("n_rs", "n_llm", "n_qt", "n_total", "loss_val", "train_tokens", "lr", "collision_rate")} == {
        "n_rs": 10, "n_llm": 1000, "n_qt": 100, "n_total": 1110, "loss_val": 2.0, "train_tokens": 64, "lr": 0.5,
        "collision_rate": 0.25,
    }  # fmt: skip
    assert sid["users"] == 50 and sid["interactions"] == 600 and sid["recall@10"] == 0.1 and sid["seed"] == 3
    assert sid["encoder_init"] == "fresh" and sid["n_lora"] is None and sid["status"] == "ok"
    llm = rows(measured)["llmxs"]
    assert (llm["n_llm"], llm["n_lora"], llm["n_total"], llm["loss_val"], llm["n_rs"]) == (700, 7, 707, 3.0, None)
    cf = rows(measured)["cfpopularity"]
    assert (cf["n_cf"], cf["n_total"], cf["loss_val"], cf["lr"], cf["seed"]) == (5, 5, None, None, 0)
    assert (cf["device"], cf["peak_memory_bytes"], cf["lr_choice"]) == ("cpu", 9, None)


def test_a_row_says_what_its_numbers_are(measured: tuple[Plan, Store]) -> None:
    found = rows(measured)
    titles = ("shared_titles_policy", "items_with_shared_title", "empty_titles", "truncated_titles")
    assert [found["llmxs"][name] for name in titles] == ["expand", 4, 1, 2]
    assert [found["sidxs"][name] for name in titles] == [None] * 4
    assert found["llmxs"]["title_score"] == "mean of tokens' log-probabilities over the catalogue"
    cold = ("users_cold", "recall@10_cold", "ndcg@10_cold")
    assert [found["llmxs"][name] for name in cold] == [12, 0.25, 0.125]
    assert [found["cfpopularity"][name] for name in cold] == [None] * 3
    assert [found[name]["loss_unit"] for name in ("sidxs", "llmxs", "cfpopularity")] == [
        "nats per item", "nats per title token", None,
    ]  # fmt: skip
    assert [found["cfbayes-optimal"][f"expected_recall@{k}"] for k in (1, 5, 10, 20)] == [0.01, 0.05, 0.1, 0.2]
    assert {row["evaluated_part"] for row in found.values()} == {"test"}


def test_the_part_evaluated_is_the_studys(study_file: Path, tmp_path: Path) -> None:
    plan, store = make_plan(load_study(study_file, ["evaluate.which=val"])), Store(tmp_path / "val")
    store.prepare(plan, {"study": "tiny", "datasets": {}})
    run_all(plan, store)
    assert {read_row(store.row(point))["evaluated_part"] for point in plan.points} == {"val"}


def test_rows_follow_the_studys_words_and_columns(measured: tuple[Plan, Store], study_file: Path) -> None:
    """The same rate stated another way is no other run, but the row says how this study chose it."""
    plan, store = measured
    scaled = next(point for point in plan.points if point.model == "xs" and point.paradigm == "sid")
    assert read_row(store.row(scaled))["lr_choice"] == "scaled by 1/width from d_model 32, not swept"
    other = make_plan(load_study(study_file, ["seeds=[3]", "sid.ladder[0].lr=0.02"]))
    assert set(other.nodes) == set(plan.nodes)
    unchanged = store.row(plan.points[0]).stat().st_ino
    refresh_rows(store, other)
    assert read_row(store.row(scaled))["lr_choice"] == "stated for this rung"
    assert store.row(plan.points[0]).stat().st_ino == unchanged
    old = pq.read_table(store.row(scaled)).drop_columns(["loss_unit"])
    pq.write_table(old, store.row(scaled))
    refresh_rows(store, other)
    assert read_row(store.row(scaled))["loss_unit"] == "nats per item"


def test_a_damaged_row_is_written_again(measured: tuple[Plan, Store]) -> None:
    plan, store = measured
    file = store.row(plan.points[0])
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert read_row(file) is None
    refresh_rows(store, plan)
    assert file.read_bytes() == whole


def test_the_launch_is_the_one_that_trained(measured: tuple[Plan, Store], study_file: Path) -> None:
    """Threads are no part of a run's identity, so the study may have other ones by now."""
    _, store = measured
    other = make_plan(load_study(study_file, ["seeds=[3]", "sid.ladder[0].launch.threads=2"]))
    refresh_rows(store, other)
    assert {str(read_row(store.row(p))["launch"]) for p in other.points} == {'{"processes":1,"threads":1}'}


def test_the_table_reads_as_one(measured: tuple[Plan, Store]) -> None:
    plan, store = measured
    table = pq.read_table(store.folder / "metrics")
    assert table.num_rows == len(plan.points) and table.schema.names == SCHEMA.names


def test_widths_have_a_table_of_their_own(
    measured: tuple[Plan, Store], study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = measured
    before = {file.name: file.read_bytes() for file in (store.folder / "metrics").iterdir()}
    assert not store.widths.exists()
    wide = make_plan(load_study(study_file, ["seeds=[3]", "sid.evaluate={widths: [50, 10]}", "llm.evaluate={widths: [5]}"]))
    store.prepare(wide, {"study": "tiny", "datasets": {}})
    refresh_rows(store, wide)
    alone = pq.read_table(store.widths).to_pylist()
    assert [(row["paradigm"], row["model"], row["beams"]) for row in alone] == [
        ("sid", "xs", 20), ("sid", "s", 20), ("llm", "xs", 20),
    ]  # fmt: skip
    few = {"recall@1": 0.02, "recall@5": 0.06, "ndcg@5": 0.01, "users_per_second": 9.5, "infer_flops_per_user": 7e6}
    monkeypatch.setitem(test_schedule.FACTS, "evaluate_llm", few)
    assert Counter(line.split("-")[0] for line in run_all(wide, store)) == {"evaluate_sid": 4, "evaluate_llm": 1}
    assert {file.name: file.read_bytes() for file in (store.folder / "metrics").iterdir()} == before
    refresh_rows(store, wide)
    table = pq.read_table(store.widths)
    assert table.schema.names == WIDTHS.names
    rows = {(row["paradigm"], row["model"], row["beams"]): row for row in table.to_pylist()}
    assert list(rows) == [
        *(("sid", "xs", beams) for beams in (10, 20, 50)), *(("sid", "s", beams) for beams in (10, 20, 50)),
        ("llm", "xs", 5), ("llm", "xs", 20),
    ]  # fmt: skip
    five = rows["llm", "xs", 5]
    assert [five[name] for name in (*few, "recall@10", "ndcg@20")] == [*few.values(), None, None]
    runs = {p.paradigm + p.model: p.run_id for p in wide.points}
    assert five["run_id"] == runs["llmxs"] and five["seed"] == 3 and five["evaluated_part"] == "test"
    assert (store.folder / five["evaluation"] / "artifact.json").is_file()
    written = store.widths.stat().st_ino
    refresh_rows(store, wide)
    assert store.widths.stat().st_ino == written, "what is right is left alone"
    store.widths.write_bytes(b"PAR1")
    refresh_rows(store, wide)
    assert pq.read_table(store.widths).equals(table)
    refresh_rows(store, plan)
    assert not store.widths.exists(), "a study that no longer asks for widths shows none"


def test_rows_that_the_plan_no_longer_has_leave_the_table_and_come_back(measured: tuple[Plan, Store], study_file: Path) -> None:
    plan, store = measured
    less = make_plan(load_study(study_file, ["seeds=[3]", "cf=[]", "llm=null"]))
    store.prepare(less, {"study": "tiny", "datasets": {}})
    assert {p.stem for p in (store.folder / "metrics").iterdir()} == {p.run_id for p in less.points}
    assert run_all(less, store) == []
    store.prepare(plan, {"study": "tiny", "datasets": {}})
    assert {p.stem for p in (store.folder / "metrics").iterdir()} == {p.run_id for p in plan.points}
