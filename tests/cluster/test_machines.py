"""Who may get work, without a cluster: what is said of a machine, and a study's folder that can't be written for a while."""

from pathlib import Path

import pytest

from cluster import machines
from cluster.machines import Checked, against, installed
from cluster.plan import make_plan
from cluster.store import Store
from cluster.study import load_study

FOLDER = Path("/shared/study")
FINE = {"sees": True, "writes": True, "missing": []} | installed()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, ""),
        ({"sees": False}, "can't see /shared/study;"),
        ({"writes": False}, "can't write in /shared/study;"),
        ({"missing": ["/data/beauty"]}, "can't see /data/beauty, which the study reads"),
        ({"torch": "1.0"}, "has torch 1.0, this machine "),
        ({"peft": None}, "has no peft, this machine "),
        ({"python": "3.0.0"}, "has python 3.0.0, this machine "),
    ],
)
def test_what_speaks_against_a_machine(found: dict[str, object], words: str) -> None:
    said = against(FINE | found, installed(), FOLDER, appeared=True)
    assert said.startswith(words) and bool(said) == bool(words)


def test_a_file_that_does_not_appear_speaks_against_it() -> None:
    assert "can't write" in against(FINE, installed(), FOLDER, appeared=False)


def test_a_folder_that_can_not_be_written_ends_no_study_that_runs(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machines, "_living", lambda: {"new": {"NodeID": "new", "Resources": {"CPU": 2.0}}})
    checked = Checked(make_plan(load_study(study_file)), Store(tmp_path / "gone"))
    with pytest.raises(OSError, match="gone"):
        checked.wait()
    assert checked() == {} and "a machine that joined could not be asked yet" in caplog.text
    assert not checked.refused  # it is asked again
