"""The report on planted measurements: a ceiling for sid, a straight line for llm."""

import csv
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.measure import WIDTHS
from cluster.report import verdict_lines, write_report
from cluster.report_words import best, evaluated, floors
from gr.errors import UserError


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.report.DRAWS", 50)


SIZES = [1e5, 3e5, 1e6, 3e6, 1e7, 3e7]


def sid(N: float) -> float:
    return 0.09 - 0.06 * (N / 1e5) ** -2.0  # flat over the 4 largest sizes: a bend there would be a lack of fit


ENCODER = 30_000_000


def llm(N: float) -> float:
    return 0.04 + 0.008 * np.log2(N / 1e5)


def row(paradigm: str, model: str, seed: int, value: float, **more: Any) -> dict[str, Any]:
    metrics = {f"recall@{k}": value * k / 10 for k in (1, 5, 10, 20)} | {"ndcg@10": value / 2}
    return {
        "study": "planned",
        "run_id": f"planted-{paradigm}-{model}-s{seed}",
        "dataset": "planted",
        "protocol": "leave-one-out",
        "paradigm": paradigm,
        "model": model,
        "seed": seed,
        "status": "ok",
        **metrics,
        **more,
    }


def measurements(seeds: int = 3, sizes: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for paradigm, curve in (("sid", sid), ("llm", llm)):
        for i, N in enumerate(SIZES[-sizes:]):
            for s in range(seeds):
                value = curve(N) * (1 + 0.008 * rng.normal())
                more = {"n_total": int(N), "n_non_embedding": int(N / 2), "train_flops": 6e6 * N, "train_seconds": N / 1e4}
                if paradigm == "sid":  # an encoder and a quantizer that all rungs share
                    more |= {"n_rs": int(N), "n_llm": ENCODER, "n_qt": 0, "n_total": int(N) + ENCODER}
                more |= {
                    "loss_val": 3.0 - value,
                    "init": "fresh",
                    "host": "box",
                    "device": "cpu",
                    "versions": '{"torch": "2.13"}',
                }
                rows.append(row(paradigm, f"r{i}", s, value, **more))
    floors = {"popularity": 0.02, "item-knn": 0.05, "markov": 0.055, "bayes-optimal": 0.12}
    return rows + [row("cf", model, 0, value) for model, value in floors.items()]


def study(
    folder: Path, rows: list[dict[str, Any]], yaml_text: str = "study: planned\nmetric: recall@10\nworthwhile: 0.02\n"
) -> Path:
    (folder / "metrics").mkdir(parents=True)
    for r in rows:
        pq.write_table(pa.Table.from_pylist([r]), folder / "metrics" / f"{r['run_id']}.parquet")
    if yaml_text:
        (folder / "study.yaml").write_text(yaml_text)
    return folder


def verdicts(report: dict[str, Any]) -> dict[str, str | None]:
    return {g["paradigm"]: g["verdict"] and g["verdict"]["verdict"] for g in report["groups"]}


def test_a_study_whole(tmp_path: Path) -> None:
    folder = study(tmp_path / "out", measurements())
    planned = ["never-run", "planted-llm-r5-s0", "planted-llm-r6-s0"]
    (folder / "plan.json").write_text(json.dumps({"study": "planned", "points": [{"run_id": name} for name in planned]}))
    failure = {"point": "planted-llm-r6-s0", "reason": "the loss became NaN at step 40", "log": "work/x/log.txt"}
    old = [{"point": name, "reason": "an old tale", "log": ""} for name in ("planted-llm-r5-s0", "no-longer-planned")]
    (folder / "failures.json").write_text(json.dumps([failure, *old]))
    report = write_report(folder)
    assert verdicts(report) == {"sid": "saturated", "llm": "still scaling"}
    assert report["worthwhile"] == 0.02
    lines = verdict_lines(report)
    assert lines[0].startswith("SID-based GR on planted, leave-one-out: saturated in n_rs. Over the 4 largest sizes")
    assert lines[1].startswith("LLM-as-RS on planted, leave-one-out: still scaling in n_total.")

    sizes = {g["paradigm"]: (g["size"], g["fixed"]) for g in report["groups"]}
    assert sizes == {"sid": ("n_rs", ENCODER), "llm": ("n_total", 0)}
    laws = {(g["paradigm"], law["law"]): law for g in report["groups"] for law in g["laws"]}
    R0 = laws["sid", "ceiling"]["params"]["R0"]
    assert R0["low"] < R0["value"] < R0["high"] and R0["value"] == pytest.approx(0.09, rel=0.03)
    g = laws["llm", "log-linear"]["params"]["g"]
    assert g["value"] == pytest.approx(0.008, rel=0.03) and g["low"] < g["value"] < g["high"]
    assert laws["sid", "ceiling"]["aicc"] < laws["sid", "log-linear"]["aicc"]
    assert laws["llm", "log-linear"]["aicc"] < laws["llm", "ceiling"]["aicc"]

    out = folder / "report"
    names = {f"planted-leave-one-out-{kind}.{end}" for kind in ("parameters", "flops") for end in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == names | {"index.html", "points.csv", "fit.json"}
    assert (out / "planted-leave-one-out-parameters.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "fit.json").read_text()) == report
    with (out / "points.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 40
    assert "an old tale" not in (out / "index.html").read_text()  # of a point measured since, and of one no longer planned
    html = (out / "index.html").read_text()
    for expected in (
        "SID-based GR: saturated",
        "LLM-as-RS: still scaling",
        "co-occurrence",
        "Bayes-optimal",
        "the loss became NaN at step 40",
        "work/x/log.txt",
        "never-run",
        "torch 2.13",
        "AICc prefers the ceiling law",
        "fresh",
    ):
        assert expected in html, expected
    assert not re.search(r'(src|href)="(?!data:)', html) and "http" not in html


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    folder = study(tmp_path / "out", measurements(sizes=4))
    write_report(folder)
    first = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    (folder / "report" / "stale.png").write_text("of an older report")
    write_report(folder)
    assert {path.name: path.read_bytes() for path in (folder / "report").iterdir()} == first


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_seeds(tmp_path: Path, seeds: int) -> None:
    report = write_report(study(tmp_path / "out", measurements(seeds=seeds)))
    html = (tmp_path / "out" / "report" / "index.html").read_text()
    assert set(verdicts(report)) == {"sid", "llm"}
    assert ("One seed per rung." in html) == (seeds == 1)


def test_three_sizes_get_the_log_linear_law_only(tmp_path: Path) -> None:
    report = write_report(study(tmp_path / "out", measurements(sizes=3)))
    assert [[law["law"] for law in g["laws"]] for g in report["groups"]] == [["log-linear"]] * 2
    assert "3 sizes cannot carry the ceiling law" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_one_size_gets_no_law(tmp_path: Path) -> None:
    report = write_report(study(tmp_path / "out", measurements(sizes=1), yaml_text="study: out\n"))
    assert verdicts(report) == {"sid": None, "llm": None} and report["study"] == "out" and report["metric"] == "recall@10"
    assert all("one size was measured" in line for line in verdict_lines(report))


def test_only_floors(tmp_path: Path) -> None:
    rows = [r for r in measurements() if r["paradigm"] == "cf"]
    report = write_report(study(tmp_path / "out", rows))
    assert report["groups"] == [] and verdict_lines(report) == []
    assert "co-occurrence" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_a_constant_metric_is_said_in_words(tmp_path: Path) -> None:
    rows = [r | {"recall@10": 0.0} if r["paradigm"] == "sid" else r for r in measurements(sizes=4)]
    report = write_report(study(tmp_path / "out", rows))
    assert verdicts(report) == {"sid": None, "llm": "still scaling"}
    assert "zero at the largest sizes" in verdict_lines(report)[0]


def test_rows_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    rows = measurements()
    rows[0] |= {"status": "failed", "recall@10": 99.0}
    rows[1] |= {"recall@10": None}
    report = write_report(study(tmp_path / "out", rows))
    assert report["points"] == 38 and verdicts(report)["sid"] == "saturated"


def test_mistakes_leave_the_old_report(tmp_path: Path) -> None:
    folder = study(tmp_path / "out", measurements(sizes=2), "study: x\nmetric: recall@7\n")
    with pytest.raises(UserError, match="no column 'recall@7'"):
        write_report(folder)
    assert not (folder / "report").exists()
    (folder / "study.yaml").write_text("study: x\n")
    (folder / "metrics" / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"broken\.parquet: cannot be read"):
        write_report(folder)
    with pytest.raises(UserError, match="no measured points"):
        (tmp_path / "study.yaml").write_text("study: y\n")
        write_report(tmp_path)


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    """Rows alone do not say which metric the study is of, nor what gain it called worthwhile."""
    folder = study(tmp_path / "out", measurements(sizes=2), yaml_text="")
    with pytest.raises(UserError, match="out: not a study folder"):
        write_report(folder)
    (folder / "study.yaml").write_text("- a list\n")
    with pytest.raises(UserError, match="out: not a study folder"):
        write_report(folder)
    (folder / "study.yaml").write_text("study: [x\n")
    with pytest.raises(UserError, match=r"study\.yaml: cannot be read"):
        write_report(folder)
    (folder / "study.yaml").unlink()
    (folder / "plan.json").write_text(json.dumps({"study": "planned", "metric": "recall@5", "worthwhile": 0.03, "points": []}))
    report = write_report(folder)
    assert (report["metric"], report["worthwhile"]) == ("recall@5", 0.03)


def text(folder: Path) -> str:
    """The page's text without tags, spaces folded."""
    html = (folder / "report" / "index.html").read_text()
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", re.sub(r'src="data:[^"]*"', "", html))).split())


def test_the_optimum_is_the_expected_one(tmp_path: Path) -> None:
    rows = [r | {"expected_recall@10": 0.1145} if r["model"] == "bayes-optimal" else r for r in measurements(sizes=2)]
    write_report(study(tmp_path / "new", rows))
    new = text(tmp_path / "new")
    assert "0.1145 (realised 0.1200)" in new and "0.0600 (realised)" in new  # recall@10, and ndcg@10 that has no expectation
    assert "below Bayes-optimal (0.1200 realised, 0.1145 expected)" in new and "at its exact expectation" in new
    write_report(study(tmp_path / "old", measurements(sizes=2)))
    old = text(tmp_path / "old")
    assert "0.1200 (realised)" in old and "below Bayes-optimal (0.1200 realised)" in old and "exact expectation" not in old
    lines = [floor.label for floor in floors(rows, "recall@10")], [floor.label for floor in floors(rows, "ndcg@10")]
    assert "Bayes-optimal" in lines[0] and "Bayes-optimal (realised)" in lines[1]
    assert next(f.value for f in floors(rows, "recall@10") if f.model == "bayes-optimal") == 0.1145


def test_who_was_evaluated() -> None:
    rows = [{"evaluated_part": "test", "evaluated_users": 22363}] * 2
    assert evaluated(rows) == ["Evaluated on the 22,363 test users."]
    assert evaluated([{}]) == []
    assert "do not say of which part" in evaluated([{"evaluated_users": 3}])[0]
    on_val = evaluated([{"evaluated_part": "val", "evaluated_users": 3}])
    assert on_val[0] == "Evaluated on the 3 validation users." and on_val[1].startswith("Warning:") and len(on_val) == 2
    differing = evaluated([*rows, {"evaluated_part": "test", "evaluated_users": 4000}])
    assert differing[0] == "Evaluated on the 4,000 or 22,363 test users." and "not all points" in differing[1]


TITLES = {"shared_titles_policy": "expand", "items_with_shared_title": 57, "empty_titles": 7, "truncated_titles": 422}


def test_what_goes_with_an_llm_ladder(tmp_path: Path) -> None:
    units = {"sid": "nats per item", "llm": "nats per title token"}
    rows = [r | {"loss_unit": units.get(r["paradigm"])} for r in measurements(sizes=2)]
    rows = [r | {"evaluated_part": "test", "evaluated_users": 900} | (TITLES if r["paradigm"] == "llm" else {}) for r in rows]
    write_report(study(tmp_path / "expand", rows))
    page = text(tmp_path / "expand")
    for expected in (
        "57 items share a title with another (policy expand), 7 have none, 422 were cut.",
        "Evaluated on the 900 test users.",
        "nats per item",
        "nats per title token",
    ):
        assert expected in page, expected
    assert "do not hold its variance" not in page and "easier task" not in page
    pretrained = [r | {"init": "pretrained", "shared_titles_policy": "merge"} if r["paradigm"] == "llm" else r for r in rows]
    write_report(study(tmp_path / "merge", pretrained))
    page = text(tmp_path / "merge")
    assert page.count("A pretrained backbone is shared by its rung's seeds: the intervals do not hold its variance.") == 1
    assert "an easier task than one of items" in page


def test_cold_targets_have_a_table_of_their_own(tmp_path: Path) -> None:
    write_report(study(tmp_path / "old", measurements(sizes=2)))
    assert "Cold targets" not in text(tmp_path / "old"), "of rows from before nothing is known of them"
    cold = {"users_cold": 321, "recall@10_cold": 0.0123, "ndcg@10_cold": 0.0077}
    rows = [r | (cold if (r["paradigm"], r["model"]) in (("llm", "r0"), ("cf", "markov")) else {}) for r in measurements(sizes=2)]
    write_report(study(tmp_path / "new", rows))
    page = text(tmp_path / "new").split("Cold targets")[1].split("Every run")[0]
    assert "at most 5 interactions in the training part" in page
    assert "LLM-as-RS r0 321 0.0123 ± 0.0000" in page and "floor co-occurrence 321 0.0123 0.0550 0.0077" in page
    assert "r1" not in page


def with_widths(folder: Path, rows: list[dict[str, Any]], gains: dict[str, dict[int, float]], noise: float = 0.0002) -> None:
    """Gives rungs other widths. ``gains``: paradigm -> width -> what it adds to the metric of the point, which has 20 beams."""
    rng = np.random.default_rng(1)
    found = []
    for r in rows:
        for beams, gain in gains.get(r["paradigm"], {}).items():
            more = gain + (noise * float(rng.normal()) if gain else 0.0)
            cost = {"users_per_second": 2000.0 / beams, "infer_flops_per_user": 1e5 * (10 + beams)}
            metrics = {f"recall@{k}": r[f"recall@{k}"] + more if k <= beams else None for k in (1, 5, 10, 20)}
            found.append({**r, **metrics, **cost, "ndcg@10": r["ndcg@10"] if beams >= 10 else None, "beams": beams})
    table = pa.Table.from_pylist([{name: row.get(name) for name in WIDTHS.names} for row in found], WIDTHS)
    pq.write_table(table, folder / "widths.parquet")


def test_beam_width_is_an_axis(tmp_path: Path) -> None:
    rows = [r | {"beams": 20} for r in measurements(sizes=2)]
    folder = study(tmp_path / "out", rows)
    before = write_report(folder)
    assert "widths" not in before and "Beam width" not in text(folder), "a study of one width says nothing of others"
    sid, llm = {5: -0.01, 10: -0.004, 20: 0.0, 50: 1e-9, 100: 1e-9}, {10: -0.02, 20: 0.0, 50: 0.01}
    with_widths(folder, rows, {"sid": sid, "llm": llm})
    report = write_report(folder)
    assert report["groups"] == before["groups"] and report["points"] == before["points"], "the fit takes them for no points"
    first, second = report["widths"]
    assert (first["paradigm"], second["paradigm"]) == ("sid", "llm")
    assert [r["model"] for r in first["rungs"]] == ["r0", "r1"]
    rung = first["rungs"][0]
    assert [w["beams"] for w in rung["widths"]] == [5, 10, 20, 50, 100] and rung["widths"][0]["mean"] is None
    assert rung["widths"][1]["mean"] == pytest.approx(rung["widths"][2]["mean"] - 0.004, abs=0.0004)
    assert {(d["from"], d["to"]) for d in rung["differences"]} == {(10, 20), (10, 50), (10, 100), (20, 50), (20, 100), (50, 100)}
    assert re.fullmatch(
        r"SID-based GR, r0: recall@10 grows up to 20 beams \(10 to 20: \+0\.00[34]\d \[\+0\.00\d\d, \+0\.00\d\d\]\), then "
        r"no more beyond noise \(20 to 100: [+-]0\.000\d \[-0\.000\d, \+0\.000\d\]\) for 3\.7 times the FLOPs\. "
        r"More than 20 beams do not pay: [+-]0\.\d% at most, under 0\.02 per doubling\.",
        rung["words"],
    )
    assert "grows up to 50 beams (20 to 50: +0.0" in second["rungs"][1]["words"]
    assert second["rungs"][1]["words"].endswith("the widest measured: where more stops paying was not reached.")
    page = text(folder).split("Beam width")[1].split("Every run")[0]
    assert rung["words"] in page and "paired by seed" in page
    mean = float(np.mean([r["recall@1"] for r in rows if r["run_id"].startswith("planted-sid-r1")]))
    line = re.search(rf"SID-based GR r1 20 \(the points'\) 3 {mean:.4f} ± 0\.\d{{4}} .*? 100 3e\+06 SID-based GR r1 50 3", page)
    assert line, "users/s and FLOPs stand beside it"
    assert len(list((folder / "report").glob("planted-leave-one-out-widths.*"))) == 2
    first_bytes = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    write_report(folder)
    assert {path.name: path.read_bytes() for path in (folder / "report").iterdir()} == first_bytes


def test_widths_are_compared_over_users_too(tmp_path: Path) -> None:
    rows = [r for r in measurements(sizes=1, seeds=1) if r["paradigm"] == "sid"]
    folder = tmp_path / "out"
    more = [r | {"model": "wide"} for r in rows]
    ranked(folder, [*rows, *more], {"r0": 0.10, "wide": 0.15})
    study(folder, rows)
    table = [{**rows[0], "beams": 20}, {**more[0], "model": "r0", "beams": 50}]
    kept = [{name: r.get(name) for name in WIDTHS.names} for r in table]
    pq.write_table(pa.Table.from_pylist(kept, WIDTHS), folder / "widths.parquet")
    [rung] = write_report(folder)["widths"][0]["rungs"]
    [difference] = rung["differences"]
    gain = table[1]["recall@10"] - table[0]["recall@10"]
    half = 1.96 * np.sqrt(gain * (1 - gain) / 2000)
    assert difference["mean"] == pytest.approx(gain) and difference["low"] is None, "one seed"
    assert [difference[f"users_{end}"] for end in ("low", "high")] == pytest.approx([gain - half, gain + half], abs=0.15 * half)
    assert f"20 to 50: {gain:+.4f}, over users [+0.0" in rung["words"] and "none is told from their noise" in rung["words"]


def test_what_the_widths_of_few_seeds_show(tmp_path: Path) -> None:
    """One seed has no noise to compare with; two that happen to gain the same are no proof of a gain."""
    for seeds, noise in ((1, 0.0002), (2, 0.0)):
        rows = measurements(sizes=1, seeds=seeds)
        folder = study(tmp_path / str(seeds), rows)
        with_widths(folder, rows, {"sid": {10: -0.004, 20: 0.0}}, noise)
        [group] = write_report(folder)["widths"]
        assert re.search(r"10 to 20: \+0\.00\d\d\. No seeds repeat these differences, so none", group["rungs"][0]["words"])
    rows = measurements(sizes=1, seeds=4)
    folder = study(tmp_path / "worse", rows)
    with_widths(folder, rows, {"sid": {20: 0.0, 100: -0.003}}, 0.0001)
    words = write_report(folder)["widths"][0]["rungs"][0]["words"]
    assert "recall@10 falls from 20 beams, the fewest measured (20 to 100: -0.003" in words
    assert re.search(r"More than 20 beams do not pay: -\d\.\d% at most", words)
    rows = measurements(sizes=1, seeds=2)
    folder = study(tmp_path / "open", rows)
    with_widths(folder, rows, {"sid": {20: 0.0, 100: 0.001}}, 0.003)
    words = write_report(folder)["widths"][0]["rungs"][0]["words"]
    assert "does not grow beyond noise from 20 beams" in words, "two seeds that differ show no gain"
    assert re.search(r"Whether more than 20 beams pay is open: 2 seeds leave room for \+\d+\.\d%\.$", words), (
        "and none that is excluded"
    )


def test_widths_that_are_missing_or_damaged(tmp_path: Path) -> None:
    rows = measurements(sizes=1)
    folder = study(tmp_path / "out", rows)
    with_widths(folder, rows, {"llm": {20: 0.0, 50: 0.001}})
    names = [r["run_id"] for r in rows if r["paradigm"] == "llm"]
    nodes = [{"id": f"w{beams}", "config": {"beams": beams}} for beams in (50, 100)]
    points = [{"run_id": name, "widths": ["w50", "w100"]} for name in [*names[:2], "never-run"]]
    (folder / "plan.json").write_text(json.dumps({"study": "planned", "points": points, "nodes": nodes}))
    failure = {"point": f"{names[0]} with 100 beams", "reason": "evaluate_llm: no memory", "log": "work/y/log.txt"}
    (folder / "failures.json").write_text(json.dumps([failure]))
    write_report(folder)
    page = text(folder).split("Points without a measurement")[1]
    assert f"{names[0]} with 100 beams evaluate_llm: no memory work/y/log.txt" in page
    assert f"{names[1]} with 100 beams not measured yet" in page and "never-run not measured yet" in page
    assert "with 50 beams" not in page and "never-run with" not in page
    (folder / "widths.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"widths\.parquet: cannot be read"):
        write_report(folder)


def ranked(folder: Path, rows: list[dict[str, Any]], rates: dict[str, float], users: int = 2000) -> None:
    """Gives each row a ranking whose share of hits at rank 3 is its model's rate; item-kNN has other easy users."""
    luck = np.random.default_rng(3).random(users)
    for i, r in enumerate(rows):
        out = folder / "artifacts" / "evaluate" / str(i)
        out.mkdir(parents=True)
        ranks = np.where((1 - luck if r["model"] == "item-knn" else luck) < rates[r["model"]], 3, 0).astype(np.int32)
        table = {"user": pa.array(range(users), pa.int64()), "target": pa.array([1] * users, pa.int32()), "rank": pa.array(ranks)}
        pq.write_table(pa.table(table), out / "hits.parquet")
        r |= {
            "evaluation": f"artifacts/evaluate/{i}",
            "recall@10": float(np.mean(ranks > 0)),
            "ndcg@10": float(np.mean(ranks > 0)) / 2,
        }


def test_differences_from_floors_have_intervals(tmp_path: Path) -> None:
    rows = [r for r in measurements(sizes=2) if r["paradigm"] != "llm"]
    folder = tmp_path / "out"
    rates = {"r0": 0.10, "r1": 0.20, "popularity": 0.05, "item-knn": 0.199, "markov": 0.30, "bayes-optimal": 0.5}
    ranked(folder, rows, rates)
    rows = [r | {"evaluation": None} if r["model"] == "popularity" else r for r in rows]
    write_report(study(folder, rows))
    page = text(folder)
    value = {r["model"]: r["recall@10"] for r in rows}
    lead = value["markov"] - value["r1"]
    half = 1.96 * np.sqrt(lead * (1 - lead) / 2000)
    found = re.search(r"below co-occurrence \(([\d.]+)\) by ([\d.]+) \[([\d.]+), ([\d.]+)\]", page)
    assert found
    expected = (value["markov"], lead, lead - half, lead + half)
    assert [float(n) for n in found.groups()] == pytest.approx(expected, abs=0.1 * half)
    assert "not told apart from item-kNN" in page
    assert re.search(r"above popularity \([\d.]+\) \(no interval\)", page)
    assert "The best rung was chosen on these same users" in page
    first = (folder / "report" / "index.html").read_bytes()
    write_report(folder)
    assert (folder / "report" / "index.html").read_bytes() == first
    ndcg = best(rows, "ndcg@10", folder)[0]  # every hit is at rank 3: a gain of 1/2
    found = re.search(r"below co-occurrence \([\d.]+\) by ([\d.]+)", ndcg)
    assert found and float(found[1]) == pytest.approx(lead / 2, abs=1e-4)
    (folder / rows[0]["evaluation"] / "hits.parquet").write_bytes(b"PAR1")
    (folder / rows[-2]["evaluation"] / "hits.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"hits\.parquet: cannot be read"):
        write_report(folder)


def test_without_rankings_there_is_no_interval(tmp_path: Path) -> None:
    write_report(study(tmp_path / "out", measurements(sizes=2)))
    page = text(tmp_path / "out")
    assert re.search(r"above co-occurrence \(0\.0550\) \(no interval\)", page) and "paired bootstrap" not in page


def test_the_caption_says_how_the_bands_were_drawn(tmp_path: Path) -> None:
    for seeds, said, unsaid in (
        (1, "residuals about the law", "bootstrap of the seeds"),
        (2, "bootstrap of the seeds", "residuals about"),
    ):
        write_report(study(tmp_path / str(seeds), measurements(seeds=seeds, sizes=4)))
        page = text(tmp_path / str(seeds))
        assert said in page and unsaid not in page
        assert ("from the spread of seeds pooled" in page) == (seeds > 1)


def test_of_rungs_of_one_size_the_better_one_stands_for_it(tmp_path: Path) -> None:
    """A rung tried at another learning rate is no seed of the first: pooled, the two would widen or bend the ladder."""
    rows = measurements()
    worse = [
        r | {"model": "r5-lr", "run_id": r["run_id"] + "-lr", "recall@10": r["recall@10"] * 0.8, "loss_val": 9.0}
        for r in rows
        if r["model"] == "r5"
    ]
    plain, more = (write_report(study(tmp_path / name, rs)) for name, rs in (("plain", rows), ("more", rows + worse)))
    assert [g["verdict"] for g in plain["groups"]] == [g["verdict"] for g in more["groups"]]
    notes = [note for g in more["groups"] for note in g["notes"]]
    assert notes.count("r5, r5-lr have one size; r5, of the least validation loss, stands for it.") == 2
