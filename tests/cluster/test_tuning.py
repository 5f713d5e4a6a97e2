import json
import math
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import price
from cluster.cli import main
from cluster.graph import Plan
from cluster.measure import read_row
from cluster.plan import make_plan
from cluster.report import write_report
from cluster.store import Store, open_store
from cluster.study import load_study
from cluster.tuning import (
    EDGE,
    SEED,
    UNKNOWN,
    Choice,
    Outcome,
    Records,
    Status,
    Sweep,
    choose,
    collect,
    edges,
    open_trials,
    transferred,
    vertex,
)
from gr.errors import UserError
from tests.cluster.conftest import LLM, ROOT, write_fake_jobs
from tests.cluster.test_report import measurements, study

LR = "sid.train.optimizer={steps: 40, global_batch: 8, lr: {tune: [0.002, 0.001, 0.004, 0.008], %s}}"
NONE = LR % "steps: 0.5"

TRAIN = """
import math, os, time
from pathlib import Path
from jobs.runtime import RunFailed, main

def body(context):
    optimizer, d_model = context.config.optimizer, context.config.size.d_model
    with open(os.environ["FAKE_RUNS"], "a") as file:
        file.write(f"train_sid {d_model} {context.config.seed} {optimizer.lr:g} {optimizer.steps}\\n")
    if optimizer.lr >= float(os.environ.get("DIVERGES_FROM", "inf")):
        raise RunFailed("loss is nan at step 3 of 4")
    if optimizer.lr == float(os.environ.get("CRASHES_AT", "nan")):
        raise RunFailed("the disk is full")
    best = 0.064 / d_model
    loss = 2.0 + abs(math.log(optimizer.lr / best)) ** 2
    for i in range(1, optimizer.validations + 1):
        step = round(optimizer.steps * i / optimizer.validations)
        context.log(step=step, steps=optimizer.steps, loss=9.0, loss_val=loss + 1 / i)
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0)) * (optimizer.lr / best))
    context.facts.update(n_rs=10 * d_model, n_non_embedding=8, train_tokens=64, loss_val=loss, init="fresh",
                         lr=optimizer.lr, steps=optimizer.steps)
    (context.out / "result.txt").write_text("x")

if __name__ == "__main__":
    main("train_sid", body)
"""

DRIVER = """
import sys
from pathlib import Path
from cluster import run as runs
from cluster.study import load_study
from gr.errors import UserError
runs._report = lambda store, plan: None
try:
    code = runs.run_study(load_study(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]), None, "fakejobs")
except UserError as error:
    print(error, file=sys.stderr)
    code = 2
print("ray loaded:", "ray" in sys.modules)
sys.exit(code)
"""


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake jobs whose best learning rate is 0.004 at d_model 16 and 0.002 at 32; the file has a line for each that ran."""
    for name, value in write_fake_jobs(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "path" / "fakejobs" / "train_sid.py").write_text(textwrap.dedent(TRAIN))
    return tmp_path / "runs.txt"


def run(study: Path, out: Path, *overrides: str, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(study), str(out), *overrides], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def rates(plan: Plan) -> dict[str, tuple[float, str]]:
    """Point (without its hash) -> the learning rate of its training, and the words about it."""
    found = {}
    for point in plan.points:
        if "optimizer" in (config := plan.nodes[point.nodes[0]].config):
            found[point.run_id.rsplit("-", 1)[0]] = (config["optimizer"]["lr"], config["optimizer"]["lr_choice"])
    return found


def end_trials(plan: Plan, records: Records, status: Status = "done", power: float = 1.0) -> None:
    """Ends every open trial: the best rate is 0.064 / d_model ** power."""
    for trial in plan.trials:
        node = plan.nodes[trial.nodes[-1]]
        if records.decided(node.id, trial.scheduler) is None:
            size = node.config.get("size") or {"d_model": 32}
            loss = abs(math.log(trial.lr * size["d_model"] ** power / 0.064))
            records.write(node.id, Outcome(trial.sweep, trial.lr, status, 20, loss, trial.scheduler))


@given(
    best=st.floats(1e-5, 1.0), curvature=st.floats(0.01, 100), factor=st.floats(1.1, 8), floor=st.floats(-10, 10),
    shift=st.floats(-0.45, 0.45),
)  # fmt: skip
def test_a_parabola_through_three_has_its_minimum_there(
    best: float, curvature: float, factor: float, floor: float, shift: float
) -> None:
    middle = math.log(best) + shift * math.log(factor)
    rates = [math.exp(middle + i * math.log(factor)) for i in (-1, 0, 1)]
    points = [(lr, floor + curvature * math.log(lr / best) ** 2) for lr in rates]
    found = vertex(points)
    assert rates[0] < found < rates[2]
    assert math.log(found / best) == pytest.approx(0, abs=2e-3)


def test_a_flat_parabola_keeps_the_middle() -> None:
    assert vertex([(0.1, 2.0), (0.2, 2.0), (0.4, 2.0)]) == 0.2


@given(st.floats(-2, 2), st.floats(-6, 0), st.sampled_from([16, 48, 64, 640]))
def test_a_law_through_two_rungs_is_carried_on(b: float, a: float, d_model: int) -> None:
    anchors = [(f"r{d}", d, Choice(math.exp(a + b * math.log(d)), "swept")) for d in (8, 32)]
    assert transferred(d_model, anchors).lr == pytest.approx(math.exp(a + b * math.log(d_model)), rel=1e-3)
    assert [transferred(d, anchors).lr for _, d, _ in anchors] == pytest.approx([c.lr for _, _, c in anchors], rel=1e-3)


def outcomes(**losses: float | None) -> list[Outcome]:
    return [Outcome("s", float(k[1:]) / 1000, "done" if v is not None else "diverged", 9, v) for k, v in losses.items()]


def test_the_choice_and_its_words() -> None:
    sweep = Sweep(tune=[0.001, 0.002, 0.004], steps=0.25, scheduler="asha")
    common = "swept over 3 values at 25% of the steps, seed 1000, least validation loss; scheduler asha"
    assert choose("s", sweep, outcomes(_1=2.0, _2=1.0, _4=3.0)) == Choice(0.002, common)
    edge = choose("s", sweep, outcomes(_1=2.0, _2=1.0, _4=0.5))
    assert edge == Choice(0.004, f"{common}; lr-edge: 0.004 is the largest of them")
    assert choose("s", sweep, outcomes(_1=0.5, _2=0.5, _4=None)).lr == 0.001, "of equal ones the smallest"
    assert choose("s", sweep, outcomes(_1=None, _2=1.0, _4=None)).words == common, "its neighbours diverged: no edge of the list"
    parabola = sweep.model_copy(update={"choose": "parabola"})
    found = choose("s", parabola, outcomes(_1=2.0, _2=1.0, _4=1.0001))
    assert 0.0027 < found.lr < 0.0029 and found.words.endswith("minimum of the parabola in log lr through 0.001, 0.002, 0.004")
    assert choose("s", parabola, outcomes(_1=2.0, _2=1.0, _4=None)) == Choice(0.002, common), "three points or none"
    with pytest.raises(UserError, match=r"^s: none of the learning rates 0.001, 0.002, 0.004 trained to the end"):
        choose("s", sweep, outcomes(_1=None, _2=None, _4=None))
    stopped = [*outcomes(_1=2.0, _4=3.0), Outcome("s", 0.002, "stopped", 3, 0.5, "asha")]
    assert choose("s", sweep, stopped).lr == 0.001, "a loss on the way is none of the end's"


def test_the_report_warns_of_edges() -> None:
    words = [
        ("xs", "swept; lr-edge: 4 is the largest of them"),
        ("s", "swept"),
        ("xs", "swept; lr-edge: 4 is the largest of them"),
    ]
    assert edges(words) == "lr-edge: the best learning rate of xs is at the edge of its list; a wider one may hold a better rate."
    assert edges([("s", "swept"), ("m", "None")]) == ""


def test_the_warning_stands_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.report.DRAWS", 20)
    words = {"r0": "swept; lr-edge: 0.1 is the largest of them", "r1": "swept"}
    rows = [row | {"lr_choice": words.get(row["model"], "stated")} for row in measurements(seeds=2, sizes=3)]
    report = write_report(study(tmp_path / "out", [row for row in rows if row["paradigm"] != "llm"]))
    assert [note for note in report["groups"][0]["notes"] if EDGE in note] == [edges([("r0", words["r0"])])]
    assert "lr-edge: the best learning rate of r0 is at the edge" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_trials_are_short_trainings_of_another_seed_and_decide_the_points(study_file: Path, tmp_path: Path) -> None:
    loaded, records = load_study(study_file, [NONE]), Records(tmp_path / "out")
    plan = make_plan(loaded, records)
    assert [trial.run_id for trial in plan.trials][:4] == [f"world-loo-sid-xs-lr0.00{i}" for i in (1, 2, 4, 8)]
    assert len(plan.trials) == 8 and not rates(plan)
    assert sorted(plan.pending) == [f"world-loo-sid-{rung}-s{seed}" for rung in ("s", "xs") for seed in (0, 1)]
    for trial in plan.trials:
        config = plan.nodes[trial.nodes[-1]].config
        assert (config["seed"], config["optimizer"]["steps"], config["optimizer"]["lr"]) == (SEED, 20, trial.lr)
    assert all(
        len(chain.nodes) == 1 for chain in plan.part(plan.trials, []).chains() if "train_sid" in plan.nodes[chain.nodes[0]].stage
    )
    end_trials(plan, records)
    decided = make_plan(loaded, records)
    assert not decided.pending and {name: lr for name, (lr, _) in rates(decided).items()} == {
        "world-loo-sid-xs-s0": 0.004, "world-loo-sid-xs-s1": 0.004, "world-loo-sid-s-s0": 0.002, "world-loo-sid-s-s1": 0.002,
    }  # fmt: skip
    stated = make_plan(load_study(study_file, ["sid.train.optimizer={steps: 40, global_batch: 8, lr: 0.004}"]))
    same = {p.run_id for p in stated.points} & {p.run_id for p in decided.points}
    assert sorted(p.rsplit("-", 1)[0] for p in same if "sid" in p) == ["world-loo-sid-xs-s0", "world-loo-sid-xs-s1"]
    measured = decided.part([], decided.points)
    assert not any(n.config.get("seed") == SEED for n in measured.nodes.values() if n.stage == "train_sid")


def test_what_one_scheduler_stopped_runs_on_under_another(study_file: Path, tmp_path: Path) -> None:
    asha, median = (load_study(study_file, [LR % f"scheduler: {name}"]) for name in ("asha", "median"))
    records = Records(tmp_path)
    plan = make_plan(asha, records)
    for trial in plan.trials:
        status: Status = "stopped" if trial.lr == 0.008 else "done"
        records.write(trial.nodes[-1], Outcome(trial.sweep, trial.lr, status, 5, trial.lr, "asha"))
    assert not open_trials(make_plan(asha, records), Store(tmp_path))
    left = open_trials(make_plan(median, records), Store(tmp_path))
    assert [trial.lr for trial in left] == [0.008, 0.008]
    assert make_plan(median, records).pending and not make_plan(asha, records).pending


def test_a_law_of_the_two_smallest_widths_stands_for_the_others(study_file: Path, tmp_path: Path) -> None:
    rung = "{name: %s, layers: 1, d_model: %d, heads: 1, d_kv: 8, d_ff: 32}"
    ladder = f"sid.ladder=[{', '.join(rung % pair for pair in (('l', 64), ('s', 16), ('m', 32), ('m2', 32)))}]"
    loaded, records = load_study(study_file, [LR % "transfer: smallest", ladder]), Records(tmp_path)
    plan = make_plan(loaded, records)
    assert Counter(trial.sweep for trial in plan.trials) == {"world-loo-sid-s": 4, "world-loo-sid-m": 4}
    assert len(plan.pending) == 8
    end_trials(plan, records)
    found = rates(make_plan(loaded, records))
    assert {name: lr for name, (lr, _) in found.items() if name.endswith("s0")} == {
        "world-loo-sid-l-s0": 0.001, "world-loo-sid-s-s0": 0.004, "world-loo-sid-m-s0": 0.002, "world-loo-sid-m2-s0": 0.002,
    }  # fmt: skip
    words = found["world-loo-sid-l-s0"][1]
    assert words.startswith(
        "log lr = a + b log d_model, b = -1.00, through s (0.004) and m (0.002), each swept over 4 values at 25%"
    )


def test_an_adapters_sweep_waits_for_its_backbones(study_file: Path, tmp_path: Path) -> None:
    study_file.write_text(study_file.read_text() + LLM)
    sweep = "{steps: 40, global_batch: 8, lr: {tune: [0.001, 0.002, 0.004]}}"
    loaded = load_study(study_file, [f"llm.{part}.optimizer={sweep}" for part in ("pretrain", "train")])
    records = Records(tmp_path)
    plan = make_plan(loaded, records)
    assert Counter(trial.sweep for trial in plan.trials) == {"world-loo-llm-xs-pretrain": 3}
    assert set(plan.pending) == {"world-loo-llm-xs-s0", "world-loo-llm-xs-s1"} and len(rates(plan)) == 4
    end_trials(plan, records)
    second = make_plan(loaded, records)
    assert Counter(trial.sweep for trial in second.trials) == {"world-loo-llm-xs-pretrain": 3, "world-loo-llm-xs": 3}
    backbones = {second.nodes[t.nodes[-1]].inputs["backbone"] for t in second.trials if t.sweep == "world-loo-llm-xs"}
    [backbone] = (second.nodes[id].config for id in backbones)
    assert (backbone["seed"], backbone["optimizer"]["lr"], backbone["optimizer"]["steps"]) == (SEED, 0.002, 40)
    end_trials(second, records)
    third = make_plan(loaded, records)
    assert not third.pending and rates(third)["world-loo-llm-xs-s0"][0] == 0.002


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (LR % "step: 1", "sid.train.optimizer.lr.step: unknown key; did you mean steps?"),
        (LR % "scheduler: hyperband", "sid.train.optimizer.lr.scheduler: 'hyperband' is not one of none, asha, median"),
        ("sid.train.optimizer.lr={tune: [0.1, 0.2]}", "sid.train.optimizer.lr.tune: list should have at least 3 items"),
        ("sid.train.optimizer.lr={tune: [0.1, 0.2, 0.1]}", "sid.train.optimizer.lr.tune: something is listed twice"),
        ("sid.train.optimizer.lr=0", "sid.train.optimizer.lr: input should be greater than 0"),
        ("sid.train.optimizer.lr={tune: [1, 2, 3]}", "lr_at_d_model scales a stated lr, and this one is swept"),
        (
            "sid.encoders.small.fresh.optimizer.lr={tune: [1, 2, 3]}",
            "sid.encoders.small.fresh.optimizer.lr: input should be a valid number",
        ),
    ],
)
def test_mistakes_in_a_sweep(study_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_study(study_file, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_mistakes_that_only_the_whole_study_shows(study_file: Path) -> None:
    for overrides, message in (
        ([NONE, "seeds=[0, 1000]"], r"study.yaml:2: seeds: 1000 is the seed of every sweep's trials; take another one"),
        (
            [LR % "transfer: smallest", "sid.ladder[1].lr=0.1"],
            r"study.yaml:\d+: sid.train.optimizer.lr.transfer: there are not two widths to sweep; state that rung's lr",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(load_study(study_file, overrides))
    stated = make_plan(load_study(study_file, [NONE, "sid.ladder[1].lr=0.1"]))
    assert {trial.sweep for trial in stated.trials} == {"world-loo-sid-xs"}
    assert rates(stated)["world-loo-sid-s-s0"] == (0.1, "stated for this rung")


def test_the_price_of_a_study_before_and_after_its_sweep(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [NONE, "sid.quantizers.rk={levels: 3, width: 256}"]
    loaded, out = load_study(study_file, overrides), tmp_path / "out"
    document = price.price(make_plan(loaded, priced=True), None)
    assert len(document["pending"]) == 4 and len(document["points"]) == 6 and len(document["trials"]) == 8
    unknown = [n for n in document["nodes"] if n["config"].get("optimizer", {}).get("lr_choice") == UNKNOWN]
    assert len(unknown) == 4 and {n["config"]["optimizer"]["lr"] for n in unknown} == {None}
    trials = [n["price"] for n in document["nodes"] if n["config"].get("seed") == SEED]
    full = [n["price"] for n in unknown]
    assert {t["flops"] * 2 for t in trials} == {f["flops"] for f in full}, "half of the steps"
    assert document["sweep_flops"] == sum(t["flops"] for t in trials)
    arguments = ["plan", str(study_file), "--set", overrides[0], "--set", overrides[1], "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "the sweep of learning rates has not run" in said and "world-loo-sid-xs lr sweep" in said
    end_trials(make_plan(loaded), Records(out))
    assert main(arguments) == 0
    assert "has not run" not in capsys.readouterr().out
    after = price.price(make_plan(loaded, Records(out), priced=True), Store(out))
    assert (after["pending"], after["sweep_seconds"]) == ([], 0)


def test_a_job_array_needs_rates_that_are_known(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["submit", "slurm", str(study_file), "--set", NONE, "--out", str(out), "--array", "--dry-run"]
    assert main(words) == 2
    assert "--array runs points of known learning rates, and some wait for a sweep; leave --array out" in capsys.readouterr().err
    end_trials(make_plan(load_study(study_file, [NONE])), Records(out))
    assert main(words) == 0
    assert "--array=1-6" in capsys.readouterr().out


def test_a_study_sweeps_measures_and_does_nothing_again(
    study_file: Path, tmp_path: Path, trainings: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("DIVERGES_FROM", "0.008")
    text, err = run(study_file, out, NONE)
    assert "tried train_sid world-loo-sid-xs-lr0.002: validation loss" in text and "Traceback" not in err
    ran = [line for line in trainings.read_text().splitlines() if line.startswith("train_sid ")]
    assert Counter(line.split()[2] for line in ran) == {"1000": 8, "0": 2, "1": 2}
    assert {line for line in ran if line.split()[2] == "0"} == {"train_sid 16 0 0.004 40", "train_sid 32 0 0.002 40"}
    assert ran.index("train_sid 16 0 0.004 40") > max(i for i, line in enumerate(ran) if " 1000 " in line)
    store, plan = open_store(out)
    rows = {p.run_id.rsplit("-", 1)[0]: read_row(store.row(p)) for p in plan.points}
    row = rows["world-loo-sid-xs-s0"]
    assert row is not None and row["lr"] == 0.004
    assert row["lr_choice"] == "swept over 4 values at 50% of the steps, seed 1000, least validation loss; scheduler none"
    assert len(list((out / "metrics").iterdir())) == 6, "no trial is among the measured"
    records = [json.loads(file.read_text()) for file in (out / "tuning").iterdir()]
    assert Counter(record["status"] for record in records) == {"done": 6, "diverged": 2}
    assert not collect(plan, store) and not open_trials(plan, store)

    trainings.write_text("")
    assert "ray loaded: False" in run(study_file, out, NONE)[0] and trainings.read_text() == ""
    assert main(["status", str(out)]) == 0
    said = capsys.readouterr().out
    assert "6 of 6 points measured" in said and "world-loo-sid-xs lr sweep" in said
    assert main(["status", str(out), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["trials"]["world-loo-sid-xs-lr0.008"] == "diverged" and status["pending"] == []
    assert status["trials"]["world-loo-sid-xs-lr0.004"] == "validation loss 2.000"


@pytest.mark.slow
@pytest.mark.long  # a minute, of which the whole suite has none left
def test_a_trial_that_crashed_is_told_and_tried_again(
    study_file: Path, tmp_path: Path, trainings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, one = tmp_path / "out", ["seeds=[0]", "sid.ladder[1].lr=0.1"]
    monkeypatch.setenv("CRASHES_AT", "0.002")
    _, err = run(study_file, out, NONE, *one, code=1)
    assert (
        "failed: world-loo-sid-xs-s0: its learning rate's sweep: world-loo-sid-xs-lr0.002: train_sid failed: the disk is full"
        in err
    )
    assert len(list((out / "metrics").iterdir())) == 3, "the baselines and the rung of a stated rate"
    monkeypatch.delenv("CRASHES_AT")
    trainings.write_text("")
    run(study_file, out, NONE, *one)
    ran = [line for line in trainings.read_text().splitlines() if line.startswith("train_sid")]
    assert ran == ["train_sid 16 1000 0.002 20", "train_sid 16 0 0.004 40"]
    trainings.write_text("")
    run(study_file, out, NONE, one[1], "seeds=[0, 1]")
    ran = [line for line in trainings.read_text().splitlines() if line.startswith("train_sid")]
    assert sorted(ran) == ["train_sid 16 1 0.004 40", "train_sid 32 1 0.1 40"], "another seed sweeps nothing"


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_scheduler_stops_what_lags_and_records_it(
    study_file: Path, tmp_path: Path, trainings: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    """Larger rates are slower here, so that at least the worst one finds others' losses to be compared with."""
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_SECONDS", "0.4")
    sweep = LR % f"scheduler: {scheduler}"
    one = "sid.ladder=[{name: xs, layers: 1, d_model: 32, heads: 1, d_kv: 8, d_ff: 8}]"
    run(study_file, out, sweep, "seeds=[0]", one)
    store, plan = open_store(out)
    records = {t.lr: Records(out).read(t.nodes[-1]) for t in plan.trials}
    stopped = {lr: r for lr, r in records.items() if r and r.status == "stopped"}
    assert stopped and 0.002 not in stopped, records
    for trial in plan.trials:
        if trial.lr in stopped:
            assert not store.artifact(plan.nodes[trial.nodes[-1]]).exists()
            record = stopped[trial.lr]
            assert record.scheduler == scheduler and record.step and 2 <= record.step < 10 and record.loss_val
    assert rates(plan)["world-loo-sid-xs-s0"][0] == 0.002 and f"scheduler {scheduler}" in rates(plan)["world-loo-sid-xs-s0"][1]
    trainings.write_text("")
    assert "ray loaded: False" in run(study_file, out, sweep, "seeds=[0]", one)[0] and trainings.read_text() == ""
    assert EDGE not in rates(plan)["world-loo-sid-xs-s0"][1]
