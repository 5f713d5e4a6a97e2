"""What `grscale fit --out` leaves: the files, and the page by itself."""

from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from fit import fit_law
from fit.figures import _limits
from fit.page import _held_out, _size, page, write
from fit.tables import read_table

HOSTILE = '<script>alert("N")</script> & $\\frac{'
SVGS = dict.fromkeys(("fit", "residuals", "correlation"), b"<svg/>")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags that nest, their attributes, and the text outside them."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text, self.images = [], [], "", []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def ladder(name="N", sizes=7):
    rng = np.random.default_rng(3)
    N = np.repeat(np.geomspace(3e5, 3e8, sizes), 3)
    R = (0.1 - 0.06 * (N / 3e5) ** -0.4) * (1 + 0.01 * rng.normal(size=len(N)))
    return read_table({name: N, "recall": R, "seed": np.tile([0, 1, 2], sizes)})


def ceiling(table, **how):
    name = table.column_names[0]
    return fit_law(table, "ceiling", {"N": name, "R": "recall"}, loss="least-squares", **how)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out, table = tmp_path_factory.mktemp("page"), ladder()
    result = ceiling(table, bootstrap=40)
    write(result, table, out / "a", "points.csv")
    return out, table, result


def test_the_files(written):
    out, _, result = written
    figures = {f"{n}.{kind}" for n in ("fit", "residuals", "correlation", "leave-largest-out") for kind in ("png", "svg")}
    assert {path.name for path in (out / "a").iterdir()} == {"report.html", "fit.json", "draws.csv", *figures}
    for name in figures:
        content = (out / "a" / name).read_bytes()
        if name.endswith("png"):
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")
    assert np.loadtxt(out / "a" / "draws.csv", delimiter=",", skiprows=1).shape == result.draws.shape


def test_the_page_stands_alone_and_says_it_all(written):
    out, _, result = written
    read = Page(out / "a" / "report.html")
    assert "script" not in read.tags and len(read.images) == 4
    assert all(src.startswith("data:image/svg+xml;base64,") for src in read.images)
    assert "http" not in read.text and "points.csv" in read.text
    for name, value in result.params.items():
        assert f"{name}{value:.6g}" in read.text
    assert result.saturation.verdict in read.text and result.saturation.reason in read.text
    assert "Mean absolute error one size ahead" in read.text
    last = result.predict({"N": [16 * 3e8]})
    assert f"16x4.8e+09{last.value[0]:.4g}" in read.text and f"{last.distance[0]:.3g}" in read.text


def test_the_same_input_gives_the_same_bytes(written):
    out, table, _ = written
    write(ceiling(table, bootstrap=40), table, out / "b", "points.csv")
    for path in (out / "a").iterdir():
        assert (out / "b" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_folder_is_of_one_fit_and_hostile_names_are_text(tmp_path):
    """Without draws there is no correlation, and none of an earlier fit is left; nor is anything else touched."""
    for name in ("correlation.png", "draws.csv", "leave-largest-out.svg", "mine.png"):
        (tmp_path / name).write_text("before")
    table = ladder(HOSTILE, sizes=4)
    write(ceiling(table), table, tmp_path, source='<img src="http://x">')
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"report.html", "fit.json", "fit.png", "fit.svg", "residuals.png", "residuals.svg", "mine.png"}
    read = Page(tmp_path / "report.html")
    assert "script" not in read.tags and len(read.images) == 2
    assert HOSTILE in read.text and '<img src="http://x">' in read.text
    assert all(src.startswith("data:") for src in read.images)
    assert "--bootstrap 1000" in read.text
    assert "4 distinct sizes; leave-largest-out needs 4 to fit and a larger one to predict" in read.text


def test_the_law_s_own_size_comes_with_what_is_against_it(written):
    """A law that its replicates contradict gives none, and the page says why."""
    _, table, result = written
    good = page(result, SVGS, "no reason", _size(result, table))
    assert "By the law, a doubling gains less than 1% of the metric from N = " in good and "None: no reason." in good
    line = fit_law(table, "log-linear", {"N": "N", "R": "recall"}, loss="least-squares")
    bad = page(line, SVGS, "no reason", _size(line, table))
    assert "No saturation size. The law does not describe the sizes within their seeds" in bad


def test_what_is_not_identified_has_an_interval_and_no_point(tmp_path):
    """A straight line in log N: the ceiling, its distance and the exponent (at its bound in every draw) cannot be told."""
    rng = np.random.default_rng(1)
    N = np.repeat(np.geomspace(3e5, 3e8, 8), 3)
    table = read_table(
        {"N": N, "recall": 0.01 * np.log2(N / 1e4) * (1 + 0.01 * rng.normal(size=24)), "seed": np.tile([0, 1, 2], 8)}
    )
    result = ceiling(table, bootstrap=40, cluster="rows")
    assert "a" in result.unidentified and result.reduced
    (tmp_path / "report.html").write_text(page(result, SVGS, "", None))
    read = Page(tmp_path / "report.html")
    low, high = result.intervals["A"]
    assert "A" in result.unidentified and low < high
    assert f"Anot identified{low:.6g} to {high:.6g}" in read.text and "anot identifiedopen" in read.text
    assert not any(f"{name}{result.params[name]:.6g}" in read.text for name in result.unidentified)
    assert f"What these data do identify: {result.reduced}." in read.text
    assert "do not quote it as a number" in read.text and "unidentified:" in read.text


def test_a_size_that_did_not_vary_leaves_its_parameters_open():
    """Held at one value in every draw, they would show an interval of no width."""
    rng = np.random.default_rng(3)
    N = np.geomspace(1e6, 1e9, 9)
    R = 0.1 - 0.06 * (N / 1e6) ** -0.3 + 0.0005 * rng.normal(size=9)
    table = read_table({"N": N, "M": np.full(9, 1e8), "Q": np.full(9, 1e6), "R": R})
    columns = {"N_RS": "N", "N_LLM": "M", "N_QT": "Q", "R": "R"}
    result = fit_law(table, "sid", columns, loss="least-squares", bootstrap=20)
    text = page(result, SVGS, "", _size(result, table))
    assert "<td>g1</td><td>not identified</td><td>open</td>" in text and "0 to 0" not in text


def test_a_law_of_several_sizes(tmp_path):
    rng = np.random.default_rng(2)
    N, D = np.exp(rng.uniform(18, 23, 9)), np.exp(rng.uniform(21, 25, 9))
    table = read_table({"N": N, "D": D, "loss": (1.8 + 480 / N**0.35 + 2100 / D**0.37) * np.exp(0.003 * rng.normal(size=9))})
    result = fit_law(table, "chinchilla", {"N": "N", "D": "D", "L": "loss"}, bootstrap=10)
    write(result, table, tmp_path)
    read = Page(tmp_path / "report.html")
    assert len(read.images) == 4 and "on the dashed line they agree" in read.text
    assert "No saturation size" not in read.text and "By the law" not in read.text


def test_a_constrained_fit_has_no_leave_largest_out_of_another():
    table = ladder()
    assert "bounds, fixed values or weights" in _held_out(ceiling(table, fixed={"a": 0.4}), table, "auto", constrained=True)


def test_a_band_that_runs_away_does_not_flatten_the_rest():
    low, high = _limits(np.array([1.0, 2.0]), np.array([-1e9, 1e9, np.inf, np.nan]))
    assert 0.3 < low < 0.5 and 2.5 < high < 2.7
    assert _limits(np.array([1.0, 2.0]), np.array([])) == pytest.approx((0.95, 2.05))
