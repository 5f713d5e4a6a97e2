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
