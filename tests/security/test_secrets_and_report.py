"""No secret of the environment in a study's folder, and no script in its report."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.report import write_report
from tests.cluster.test_report import row
from tests.cluster.test_run import DRIVER

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY", "GRSCALE_PASSWORD")
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "</style><svg onload=alert(1)>", "$x_{$"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


@pytest.mark.slow
def test_no_secret_is_written_into_a_studys_folder(
    study_file: Path, tmp_path: Path, fake_jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = {name: f"mark{i}" + "0123456789abcdef" * 3 for i, name in enumerate(SECRETS)}
    for name, mark in marks.items():
        monkeypatch.setenv(name, mark)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    out = tmp_path / "out"
    words = [sys.executable, "-c", DRIVER, str(study_file), str(out), "seeds=[0, 13]"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=dict(os.environ))
    assert done.returncode == 1, done.stdout + done.stderr  # seed 13 fails, so that there are logs of failures too
    sbatch = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "submit", "slurm", str(study_file), "--dry-run"], capture_output=True, text=True
    )
    assert sbatch.returncode == 0 and "#SBATCH" in sbatch.stdout
    files = [path for path in out.rglob("*") if path.is_file()]
    assert fake_jobs.read_text() and {"log.txt", "artifact.json", "plan.json", "run.yaml"} <= {path.name for path in files}
    texts = {str(path): path.read_bytes() for path in files} | {"sbatch": sbatch.stdout.encode()}
    texts["terminal"] = (done.stdout + done.stderr).encode()
    leaks = [(name, place) for name, mark in marks.items() for place, text in texts.items() if mark.encode() in text]
    assert leaks == []


def test_names_in_a_report_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.report.DRAWS", 20)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "study.yaml").write_text("study: '<script>alert(1)</script>'\n")
    sizes = [1e5, 3e5, 1e6, 3e6]
    rows = [row("sid", f"m{i}", seed, 0.05 + 0.01 * i) | {"n_total": int(n)} for i, n in enumerate(sizes) for seed in (0, 1)]
    for number, name in enumerate(HOSTILE):
        rows[number] |= {"model": name, "host": name, "device": name, "versions": name, "init": name, "lr_choice": name}
    for one in rows:
        one |= {"dataset": HOSTILE[0], "protocol": HOSTILE[4]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metrics" / "rows.parquet")
    failed = '[{"point": "<script>1</script>", "reason": "<img src=x>", "log": "<b>", "ran": true}]'
    (tmp_path / "failures.json").write_text(failed)
    write_report(tmp_path)
    page = Tags()
    page.feed((tmp_path / "report" / "index.html").read_text())
    assert not {tag for tag, _ in page.found} & {"script", "svg", "iframe", "object"}
    assert not [name for _, names in page.found for name in names if name.startswith("on")]
    figures = list((tmp_path / "report").glob("*.svg"))
    assert figures
    for file in figures:
        kinds = {element.tag.rsplit("}", 1)[-1] for element in ET.fromstring(file.read_bytes()).iter()}
        assert "script" not in kinds and "image" not in kinds and "foreignObject" not in kinds
    assert not [path for path in tmp_path.rglob("*") if "<" in path.name]
