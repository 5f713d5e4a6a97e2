"""`grscale fit` and what importing the package costs."""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from fit import cli
from fit.laws import LAWS


@pytest.fixture
def points(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["Model Size,recall,seed,paradigm"]
    for N in np.geomspace(3e5, 3e8, 6):
        for seed in range(3):
            lines.append(f"{N:.0f},{(0.1 - 0.06 * (N / 3e5) ** -0.4) * (1 + 0.01 * rng.normal()):.6f},{seed},sid")
            lines.append(f"{N:.0f},{0.04 * (1 + 0.01 * rng.normal()):.6f},{seed},llm")
    path = tmp_path / "points.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def call(*words):
    parser = argparse.ArgumentParser(prog="grscale fit")
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


CEILING = ["--law", "ceiling", "--columns", "N=Model Size,R=recall", "--where", "paradigm=sid", "--loss", "least-squares"]


def test_json_is_one_document(points, capsys):
    assert call(points, *CEILING, "--bootstrap", 40, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["law"] == "ceiling" and document["n"] == 18
    assert document["params"]["R0"]["low"] < 0.1 < document["params"]["R0"]["high"]
    assert document["saturation"]["verdict"] == "still scaling"


def test_readable_table(points, capsys):
    assert call(points, *CEILING, "--bootstrap", 40) == 0
    out = capsys.readouterr().out
    assert "R = R0 - A/N^a" in out and "95%" in out and "still scaling:" in out
    assert call(points, *CEILING) == 0
    assert "--bootstrap 1000 gives them" in capsys.readouterr().out


def test_out_writes_the_fit_the_draws_and_a_page(points, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(points, *CEILING, "--bootstrap", 40, "--out", out) == 0
    assert {"report.html", "fit.json", "draws.csv", "fit.png", "fit.svg"} <= {path.name for path in out.iterdir()}
    assert np.loadtxt(out / "draws.csv", delimiter=",", skiprows=1).shape == (40, 3)
    assert f"{points} paradigm=sid" in (out / "report.html").read_text()
    assert json.loads((out / "fit.json").read_text())["law"] == "ceiling"
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--law", "ceiling", "--columns", "N=Model Size,R=recal"], "no column 'recal' (for R); did you mean 'recall'?"),
        (["--law", "ceiling", "--columns", "N=Model Size;R=recall"], "needs columns N, R; got N"),
        (["--law", "ceiling", "--columns", "N"], "--columns: 'N' is not of the form NAME=VALUE"),
        (["--law", "ceiling", "--columns", "N=seed,N=recall"], "--columns: N is given twice"),
        (["--law", "ceiling", "--columns", "N=Model Size,R=paradigm"], "row 1: 'sid' is not a number"),
        ([*CEILING[:4], "--where", "paradigm=cf"], "no row has paradigm=cf; there are llm, sid"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(points, words, message, capsys):
    assert call(points, *words, "--json") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


def test_help_names_every_law(capsys):
    with pytest.raises(SystemExit):
        call("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert [name for name in LAWS if name not in text.replace("log- linear", "log-linear")] == []


def test_importing_is_quick_and_light():
    """`import fit` loads no numpy; the command line's options load none either; nothing here loads another package of ours."""
    code = (
        "import sys, fit, fit.cli; assert 'numpy' not in sys.modules; import fit.fitting, fit.verdict; "
        "heavy = {'torch', 'ray', 'transformers', 'matplotlib', 'pandas', 'gr', 'jobs', 'cluster'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - began < 5


def test_bounds_fixed_values_and_weights(points, capsys):
    assert call(points, *CEILING, "--fix", "R0=0.11", "--bounds", "a=0.1:0.9", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["params"]["R0"]["value"] == 0.11 and 0.1 <= document["params"]["a"]["value"] <= 0.9
    assert call(points, *CEILING, "--weights", "seed") == 2  # a seed of 0 is no weight
    assert "sizes must be above zero" not in (err := capsys.readouterr().err) and "above zero" in err
    for words, message in (
        (["--bounds", "a=1"], "--bounds: '1' is not of the form LOW:HIGH, such as 0.1:2"),
        (["--fix", "a=x"], "--fix: 'x' is not a number"),
        (["--fix", "q=1"], "no parameter 'q'; it has R0, A, a"),
        (["--bounds", "a=2:1"], "a: bounds 2 to 1 are not from low to high"),
    ):
        assert call(points, *CEILING, *words) == 2
        assert message in capsys.readouterr().err


def test_what_is_not_identified_is_no_number_to_copy(points, capsys):
    words = ["--law", "ceiling", "--columns", "N=Model Size,R=recall", "--where", "paradigm=llm", "--loss", "least-squares"]
    assert call(points, *words, "--bootstrap", 40) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.strip().startswith("a ")]
    assert "not identified   95%" in line
    assert any(line.startswith("warning unidentified:") for line in lines)


def test_every_name_of_the_package_can_be_had_and_every_code_has_words():
    import fit

    for name in fit.__all__:
        assert getattr(fit, name) is not None
    assert fit.explain("one:dead:B").startswith("The first law: B contributes nothing")
    for code in ("no-optimum:3.0%", "crossings:3"):
        assert fit.explain(code) != code


def test_profiles_predictions_other_laws_and_sizes_held_out(points, capsys):
    words = ["--profile", "--predict", "N=1e9", "--compare", "log-linear", "--holdout", "--saturation-size", "--bootstrap", 40]
    assert call(points, *CEILING, *words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["profile"]["R0"]["low"] < 0.1 < document["profile"]["R0"]["high"]
    (there,) = document["predictions"]
    assert there["sizes"] == {"N": 1e9} and there["run_low"] < there["low"] < there["value"] < there["high"] < there["run_high"]
    assert there["profile"]["low"] < there["value"] < there["profile"]["high"] and there["warnings"] == ["extrapolates:3.3x"]
    assert document["compare"]["best"] == "ceiling" and [law["law"] for law in document["compare"]["laws"]] == [
        "ceiling",
        "log-linear",
    ]
    assert 0 < document["holdout"]["next_error"] < 0.05
    assert document["saturation_size"]["low"] < document["saturation_size"]["size"] < document["saturation_size"]["high"]
    assert call(points, *CEILING, *words) == 0
    out = capsys.readouterr().out
    for part in ("profile 95%", "at N=1000000000.0:", "laws compared", "leave largest out", "saturation size: a doubling gains"):
        assert part in out, part


def test_each_curve_of_a_column_and_their_verdicts_together(points, capsys):
    words = ["--law", "ceiling", "--columns", "N=Model Size,R=recall", "--loss", "least-squares", "--by", "paradigm"]
    assert call(points, *words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["by"] == "paradigm" and set(document["curves"]) == {"sid", "llm"} and document["failed"] == {}
    alone = document["curves"]["sid"]["saturation"]
    together = document["holm"]["sid"]
    assert alone["p_scaling"] < together["p_scaling"] and "holm:2" in together["warnings"]
    assert call(points, *words) == 0
    out = capsys.readouterr().out
    assert "== paradigm = sid" in out and "verdicts of 2 curves judged together (Holm)" in out
    with points.open("a") as file:
        file.write("300000,0.05,0,cf\n")
    assert call(points, *words) == 0
    assert (
        "== paradigm = cf\nnot fitted: law ceiling has 3 parameters; 1 distinct size cannot carry it" in capsys.readouterr().out
    )
    assert call(points, *words, "--where", "paradigm=cf") == 2
    assert "no curve by 'paradigm' can be fitted; cf: law ceiling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predict", "N=abc"], "--predict: 'abc' is not a number"),
        (["--predict", "N=0"], "0; sizes must be above zero"),
        (["--compare", "cieling"], "unknown law 'cieling'"),
        (["--compare", "two-term"], "needs a column for N_SI"),
        (["--compare", "hinge,"], "--compare: 'hinge,' is not of the form LAW,LAW"),
        (["--by", "paradgm"], "no column 'paradgm'; did you mean 'paradigm'?"),
        (["--by", "paradigm", "--out", "there"], "--out is of one curve"),
        (["--by", "paradigm", "--groups", "seed"], "give one of them"),
        (["--groups", "seed", "--holdout"], "--holdout is of one curve"),
        (["--worthwhile", "1.5"], "worthwhile 1.5 is no share"),
    ],
)
def test_mistakes_in_what_else_is_asked(points, words, message, capsys):
    assert call(points, *CEILING, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


GOOD = [(N, 0.1 - 0.06 * (N / 3e5) ** -0.4 + (-1) ** i * 4e-4) for i, N in enumerate(np.repeat(np.geomspace(3e5, 3e8, 6), 2))]
BAD = {
    "text in a number's place": ([(3e5, "n/a"), *GOOD[1:]], 2, "column 'R', row 1: 'n/a' is not a number"),
    "fewer sizes than parameters": (GOOD[:4], 2, "law ceiling has 3 parameters; 2 distinct sizes cannot carry it"),
    "one size": ([(3e5, R) for _, R in GOOD], 2, "law ceiling has 3 parameters; 1 distinct size cannot carry it"),
    "a size below zero": ([(-3e5, 0.04), *GOOD[1:]], 2, "column 'N' (for N), row 1: -300000; sizes must be above zero"),
    "a size of zero": ([*GOOD[:-1], (0.0, 0.09)], 2, "column 'N' (for N), row 12: 0; sizes must be above zero"),
    "no number": ([(3e5, float("nan")), *GOOD[1:]], 2, "column 'R', row 1: nan is not a finite number"),
    "infinity": ([(3e5, float("inf")), *GOOD[1:]], 2, "column 'R', row 1: inf is not a finite number"),
    "an empty cell": ([(3e5, None), *GOOD[1:]], 2, "column 'R', row 1: empty; a number is needed in every row"),
    "a constant": ([(N, 0.05) for N, _ in GOOD], 2, "every value is 0.05; a constant metric has no law"),
    "no rows": ([], 2, "no rows"),
    "no noise at all": ([(N, 0.1 - 0.06 * (N / 3e5) ** -0.4) for N, _ in GOOD], 0, "warning perfect:"),
    "percentages": ([(N, 100 * R) for N, R in GOOD], 0, "warning percent:R:"),
}


def _write(folder, kind, rows):
    """The rows as a table of one of the kinds that are read; a column of mixed types as text where a format has only one type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "csv":
        path = folder / "points.csv"
        path.write_text("\n".join(["N,R", *(f"{N},{'' if R is None else R}" for N, R in rows)]) + "\n")
        return path
    if kind == "jsonl":
        path = folder / "points.jsonl"
        path.write_text("".join(json.dumps({"N": N, "R": R}) + "\n" for N, R in rows))
        return path
    mixed = any(isinstance(R, str) for _, R in rows)
    columns = {"N": pa.array([N for N, _ in rows], pa.float64()), "R": [str(R) if mixed else R for _, R in rows]}
    table = pa.table(columns)
    if kind == "parquet":
        pq.write_table(table, folder / "points.parquet")
        return folder / "points.parquet"
    (folder / "points").mkdir()
    for part, rows_ in enumerate((table[: len(rows) // 2], table[len(rows) // 2 :])):
        pq.write_table(rows_, folder / "points" / f"{part}.parquet")
    return folder / "points"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder"])
@pytest.mark.parametrize("case", BAD)
def test_tables_that_carry_no_fit_say_so_and_doubtful_ones_warn(case, kind, tmp_path, capsys):
    rows, code, message = BAD[case]
    assert call(_write(tmp_path, kind, rows), "--law", "ceiling", "--columns", "N=N,R=R") == code
    captured = capsys.readouterr()
    assert message in (captured.err if code else captured.out)
    if code:
        assert captured.out == "" and captured.err.count("\n") == 1


def test_a_line_that_is_no_object_is_named(tmp_path, capsys):
    path = tmp_path / "points.jsonl"
    for text, message in (('{"N": 1}\n[1, 2]\n', "line 2: not a JSON object"), ('{"N": 1}\n{"N": \n', "line 2: not JSON")):
        path.write_text(text)
        assert call(path, "--law", "ceiling", "--columns", "N=N,R=R") == 2
        assert message in capsys.readouterr().err
