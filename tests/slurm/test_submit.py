"""The sbatch files as text: what a user gives can neither run nor break them. No Slurm is needed."""

import math
import re
import signal
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import allocation, cli, sbatch, submit
from cluster.plan import make_plan
from cluster.price import price
from cluster.store import Store
from cluster.study import load_study
from gr.errors import UserError
from tests.cluster.conftest import LLM, STUDY

HOSTILE = ["x; touch pwned", "$(touch pwned)", "`touch pwned`", "x\n#SBATCH --wrap=touch", "-x", "", "a b", "x'", 'x"', "é", "%j"]
PATHS = st.text(
    st.one_of(st.sampled_from(list(" '\"$`(){}[]&|;<>#!*?~%=@,:")), st.characters(codec="utf-8", exclude_characters="/\\\0")),
    min_size=1,
    max_size=30,
)


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def parsed(*words: str) -> Namespace:
    parser = ArgumentParser()
    submit.add_arguments(parser)
    return parser.parse_args(words)


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["submit", "slurm", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --").partition("=") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {key: value for key, _, value in lines}


def check_bash(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_study_becomes_one_file_and_dry_run_writes_nothing(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--time",
        "24:00:00",
        "--account",
        "abc",
        "--partition",
        "a,b",
        "--qos",
        "low",
    ]
    out = tmp_path / "out"
    text = dry_run(capsys, str(study_file), *options, "--mem", "64G", "--out", str(out))
    check_bash(text)
    assert directives(text) == {
        "job-name": "grscale-tiny", "account": "abc", "partition": "a,b", "qos": "low", "nodes": "2", "ntasks-per-node": "1",
        "gpus-per-node": "8", "mem": "64G", "time": "24:00:00", "signal": "B:USR1@600", "open-mode": "append",
        "output": f'"{out}/slurm/%j.log"', "requeue": "", "exclusive": "",
    }  # fmt: skip
    assert text.startswith("#!/bin/bash\n") and "{{" not in text and "{%" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.yaml"]


@pytest.mark.parametrize(
    ("words", "kind"), [([], "ray"), (["--chain", "3"], "ray"), (["--array"], "array"), (["--cpus-per-node", "4"], "ray")]
)
def test_every_shape_is_valid_bash(study_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], kind: str) -> None:
    text = dry_run(capsys, str(study_file), *words)
    check_bash(text)
    assert ("cluster.allocation task" in text) == (kind == "array")
    assert ("scontrol requeue" in text) == ("--chain" not in words)  # in a chain the next job goes on
    assert ("exclusive" in directives(text)) == ("cpus-per-task" not in directives(text))


@pytest.mark.parametrize("option", ["account", "partition", "qos", "mem", "time"])
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_option_is_refused(study_file: Path, capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert cli.main(["submit", "slurm", str(study_file), f"--{option}={value}", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"submit slurm: --{option}: {value!r} is not" in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes: 0 is less than 1"),
        (["--nodes", "two"], "invalid int value: 'two'"),
        (["--chain", "0"], "--chain: 0 is less than 1"),
        (["--array", "--nodes", "2"], "each point runs on one node"),
        (["--array", "--chain", "2"], "leave --chain out"),
        (["--array", "--chain", "auto"], "leave --chain out"),
        (["--chain", "auto"], "--chain auto: give --time"),
        (["--chain", "many"], "'many' is neither a number of jobs nor auto"),
        (["--time", "1", "--chain", "auto"], "leaves nothing before the notice of 60 s"),
        (["--time", "2", "--chain", "auto", "--set", "resources.flops_per_second=1e4"], "over 20; give more --nodes or --time"),
        (["--out", "s3://bucket/study"], "share a path, not a URL"),
        (["--time", "0:00"], "'0:00' is no time at all"),
        (["--cpus-per-node", "1"], "--cpus-per-node is 1, but a stage needs 4"),
        (["--set", "resources.gpus_per_process=1"], "up to 2 GPUs; give --gpus-per-node"),
        (["--out", "a\nb"], "can't stand in an sbatch file"),
        (["--out", "a\\b"], "can't stand in an sbatch file"),
    ],
)
def test_mistakes_are_named(study_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    study_file.write_text(study_file.read_text().replace("d_ff: 64}", "d_ff: 64, launch: {processes: 2, threads: 2}}"))
    assert cli.main(["submit", "slurm", str(study_file), *words, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [["slurm"], ["ray", "--address", "http://127.0.0.1:1"]])
def test_a_url_is_refused_and_nothing_is_written(
    study_file: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", *words, str(study_file), "--out", "s3://bucket/study"]) == 2
    error = capsys.readouterr().err
    assert "share a path, not a URL" in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_chain_auto_counts_the_jobs_that_the_priced_time_needs(study_file: Path, tmp_path: Path) -> None:
    """The longest path bounds it below: more nodes help only until there."""
    plan, store = make_plan(load_study(study_file), priced=True), Store(tmp_path / "out")
    prices = {entry["id"]: entry["price"] for entry in price(plan, store)["nodes"]}
    work = sum(p["seconds"] * p["processes"] * p["threads"] for p in prices.values())
    longest = max(sum(prices[node.id]["seconds"] for node in plan.upstream(point)) for point in plan.points)

    def jobs(nodes: int, limit: str) -> int:
        options = parsed("slurm", "x", "--chain", "auto", "--time", limit, "--nodes", str(nodes), "--cpus-per-node", "1")
        return submit.chain_length(options, plan, store)[0]

    each = 66 - 60  # --time 1:06, less the notice
    assert jobs(1, "1:06") == math.ceil(max(work, longest) / each) > jobs(2, "1:06") >= 1
    assert jobs(1000, "1:06") <= math.ceil(longest / each) and jobs(1, "24:00:00") == 1


def test_without_sbatch_it_says_so_and_writes_nothing(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["submit", "slurm", str(study_file), "--out", str(tmp_path / "out")]) == 2
    assert "sbatch is not here" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("2-12:30", 217800), ("1-00:00:10", 86410)],
)
def test_limits_are_read_as_slurm_reads_them(limit: str, expected: int) -> None:
    assert sbatch.seconds(limit) == expected


@given(name=PATHS)
@settings(max_examples=60, deadline=None)
def test_any_path_reaches_bash_whole_or_is_refused(name: str) -> None:
    """Every `{{ value }}` of every template, in the shell that will read it."""
    values = {
        "out": Path("/scratch") / name,
        "python": f"/opt/{name}/python",
        "root": f"/opt/{name}",
        "points": 3,
        "chain": False,
        "grace": 30,
    }
    try:
        sbatch.checked(values["out"])
    except UserError:
        assert not name.isprintable() or "\\" in name
        return
    options = parsed("slurm", "study.yaml")
    lines = sbatch.directives(options, "grscale-x", sbatch.log_path(values["out"], "%j.log"), None)
    for template in ("ray.sbatch", "array.sbatch"):
        text = sbatch.fill(template, directives=lines, file=values["out"] / "slurm" / template, **values)
        assert {line.split("=")[0].split(" ")[0] for line in text.splitlines() if line.startswith("#SBATCH")} == {"#SBATCH"}
        assert len(re.findall("^#SBATCH", text, re.MULTILINE)) == len(lines)
        assignments = [line for line in text.splitlines() if re.match(r"(out|python)=", line)]
        script = "\n".join(assignments) + '\nprintf "%s\\0%s" "$out" "$python"'
        done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, env={"PATH": "/nowhere"})
        assert done.stdout.decode() == f"{values['out']}\0{values['python']}" and not done.stderr


def test_a_template_with_a_missing_value_is_an_error() -> None:
    with pytest.raises(Exception, match="'out' is undefined"):
        sbatch.fill("ray.sbatch", directives=[], root="/", python="python", chain=False)


def test_the_tasks_of_an_array_are_the_whole_study_and_nothing_twice(study_file: Path) -> None:
    study_file.write_text(STUDY + LLM)
    plan = make_plan(load_study(study_file))
    tasks = [[node.id for node in allocation.task_nodes(plan, task)] for task in range(len(plan.points) + 1)]
    assert sorted(id for task in tasks for id in task) == sorted(plan.nodes)
    known = set(tasks[0])
    for point, task in zip(plan.points, tasks[1:], strict=True):
        assert {node.id for node in plan.upstream(point)} <= known | set(task)  # no task waits for another one's work


RUN = {
    "stage": "pretrain_llm", "id": "x", "out": "out", "work": "work", "inputs": {"split": "split"},
    "config": {"size": {"layers": 1, "d_model": 8, "heads": 2, "d_ff": 8}, "optimizer": {"steps": 1, "lr": 0.1}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("launch", "words", "present", "absent"),
    [
        ({"processes": 4}, ["--nodes", "2", "--gpus-per-node", "2"], ["--multi_gpu", "--num_processes 4"], ["USE_CPU=true"]),
        ({"processes": 2}, ["--nodes", "2"], ["ACCELERATE_USE_CPU=true", '--machine_rank "$SLURM_NODEID"'], ["deepspeed"]),
        ({"processes": 2, "zero": 2}, ["--nodes", "2"], ["--use_deepspeed", "DS_ACCELERATOR=cpu"], ["USE_CPU=true", "multi_gpu"]),
        ({"processes": 1}, [], ['exec "$python" -m jobs.pretrain_llm "$run"'], ["accelerate.commands"]),
    ],
)
def test_one_stage_over_several_nodes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    launch: dict[str, int],
    words: list[str],
    present: list[str],
    absent: list[str],
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN | {"launch": launch}))
    text = dry_run(capsys, str(path), *words)
    check_bash(text)
    assert all(word in text for word in present) and not any(word in text for word in absent)
    assert cli.main(["submit", "slurm", str(path), "--nodes", "3", "--dry-run"]) == 2
    assert f"launch.processes is {launch['processes']}; it has to fit 3 nodes" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["head:8265", "http://user@head:8265", "ftp://head", "http://a b"])
def test_a_wrong_dashboard_address_is_named(study_file: Path, capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert cli.main(["submit", "ray", str(study_file), "--address", address]) == 2
    assert "is not the URL of a dashboard" in capsys.readouterr().err


WORK = """
stop_work() { kill -TERM "$work"; }
sleep 60 & other=$!
PYTHON -c 'import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(CODE))
print("ready", flush=True)
time.sleep(END)
sys.exit(CODE)' & work=$!
wait_for "$work"
code=$?
kill "$other"
wait_for "$other"
end "$code"
"""


@pytest.mark.parametrize(
    ("code", "signum", "chain", "preempted", "expected"),
    [
        (0, None, False, "None", (0, "")),
        (7, None, False, "None", (7, "")),
        (130, signal.SIGUSR1, False, "None", (-9, "requeue 12\n")),
        (130, signal.SIGUSR1, True, "None", (130, "")),  # the next of the chain goes on
        (0, signal.SIGUSR1, False, "None", (0, "")),  # it was just done
        (7, signal.SIGTERM, False, "None", (7, "")),  # scancel: nothing goes back into the queue
        (7, signal.SIGTERM, False, "2026-01-01T00:00:00", (7, "")),  # scancel in the grace time
        (1, None, False, "2026-01-01T00:00:00", (-9, "requeue 12\n")),  # its step was told, and saved
        (1, None, True, "2026-01-01T00:00:00", (1, "")),
    ],
)
def test_the_shell_passes_on_the_exit_code_and_requeues_only_what_was_stopped_unfinished(
    tmp_path: Path, code: int, signum: signal.Signals | None, chain: bool, preempted: str, expected: tuple[int, str]
) -> None:
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(
        "#!/bin/bash\n"
        f'if [ "$1" = show ]; then echo " PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={preempted}"; exit; fi\n'
        f'echo "$@" >{asked}\nkill -KILL $PPID\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    end = "1" if signum in (None, signal.SIGTERM) else "60"
    script = sbatch.fill("work.sh", chain=chain) + WORK.replace("CODE", str(code)).replace("END", end).replace(
        "PYTHON", sys.executable
    )
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1"}
    shell = subprocess.Popen(["/bin/bash", "-uc", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    while shell.stdout.readline().strip() != "ready":
        pass
    if signum is not None:
        shell.send_signal(signum)
    shell.wait(30)
    assert (shell.returncode, asked.read_text() if asked.exists() else "") == expected
