"""What comes from outside, a study file, a data set, a study's folder, writes nowhere but in its own folders and runs no code."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.plan import make_plan
from cluster.store import Store, open_store
from cluster.study import load_study
from gr.data.dataset import Dataset, DatasetWriter, Item, User
from gr.data.split import Split
from gr.errors import UserError
from jobs.runtime import read_run
from tests.cluster.conftest import STUDY

OUTSIDE = ["../evil", "/tmp/evil", "a/../../evil", "..", ".", "", "a/b", "a\nb", "$(touch evil)", "a b", "{{ 7 * 7 }}", "<b>x"]
TAG = "!!python/object/apply:os.system ['touch {}']"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["study", "world", "xs", "rk", "small"])
def test_a_name_that_could_leave_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = {"study": "study: tiny", "xs": "name: xs", "world": "  world:", "rk": "    rk:", "small": "    small:"}[key]
    new = f"{old.split(':')[0]}: {json.dumps(name)}" if key in ("study", "xs") else old.replace(key, json.dumps(name))
    assert STUDY.count(old) == 1
    (tmp_path / "study.yaml").write_text(STUDY.replace(old, new))
    assert main(["run", "study.yaml"]) == 2
    assert "a name is letters, digits, dots, dashes and underscores" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize("where", ["study: tiny", "study: tiny\nseeds: [0]"])
def test_tags_of_yaml_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "study.yaml"
    file.write_text(STUDY.replace("study: tiny", f"{where}\nextra: {TAG.format(marker)}"))
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == 2
    assert str(file) in one_line(capsys)
    with pytest.raises(UserError, match=r"run\.yaml"):
        (tmp_path / "run.yaml").write_text(f"stage: {TAG.format(marker)}")
        read_run(tmp_path / "run.yaml")
    file.write_text(STUDY)
    assert main(["run", str(file), "--out", str(tmp_path / "out"), "--set", f"study={TAG.format(marker)}"]) == 2
    one_line(capsys)
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    with DatasetWriter(tmp_path / "data", "d", {}, [Item("a"), Item("b")]) as writer:
        writer.add(User("u", [0, 1], [1, 2]))
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "", 7, None, "a/b"])
@pytest.mark.parametrize("entry", ["items", "shards"])
def test_a_manifest_names_files_of_its_own_folder_only(dataset: Path, name: Any, entry: str) -> None:
    Dataset(dataset).verify()
    file = dataset / "manifest.json"
    manifest = json.loads(file.read_text())
    (manifest["items"] if entry == "items" else manifest["shards"][0])["file"] = name
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: file .* is no name of a file in this folder"):
        Dataset(dataset)
    file.write_text(json.dumps(manifest | {"protocol": {}}))
    with pytest.raises(UserError, match=r"manifest.json: file .* is no name of a file in this folder"):
        Split(dataset)


@pytest.fixture
def study(tmp_path: Path, study_file: Path) -> Store:
    store, loaded = Store(tmp_path / "out"), load_study(study_file)
    store.prepare(make_plan(loaded), loaded.raw)
    return store


@pytest.mark.parametrize(
    "place", ["artifacts", "metrics", "work", "report", "artifacts/encode", "work/x", "metrics/x.parquet", "work/x/log.txt"]
)
def test_a_link_out_of_the_studys_folder_is_refused(
    study: Store, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    link = study.folder / place
    if link.is_dir():
        link.rmdir()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere)
    for words in (["run", str(study_file), "--out"], ["status"], ["report"]):
        assert main([*words, str(study.folder)]) == 2
        assert f"{link}: a link out of the study's folder" in one_line(capsys)
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_a_link_to_the_whole_folder_or_within_it_is_fine(study: Store, tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to(study.folder)
    (study.folder / "work" / "latest").symlink_to(study.folder / "metrics")
    assert open_store(tmp_path / "short")[0].folder == study.folder


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", ".."])
def test_a_foreign_plan_can_not_name_places_outside(
    study: Store, capsys: pytest.CaptureFixture[str], name: str, tmp_path: Path
) -> None:
    file = study.folder / "plan.json"
    good = json.loads(file.read_text())
    for key, field in (("points", "run_id"), ("nodes", "id"), ("nodes", "stage")):
        document = json.loads(json.dumps(good))
        document[key][0][field] = name
        file.write_text(json.dumps(document))
        assert main(["report", str(study.folder)]) == 2
        assert "the folder can't be trusted" in one_line(capsys)
    assert not list(tmp_path.rglob("evil*"))


def test_a_catalogue_is_data_whatever_its_titles_say(tmp_path: Path) -> None:
    titles = ["<script>alert(1)</script>", "{{ 7*7 }}", "$(touch x)", "../../x", "\x00null", "a\nb", "=cmd()"]
    with DatasetWriter(tmp_path / "data", "d", {}, [Item(f"../{i}", title) for i, title in enumerate(titles)]) as writer:
        writer.add(User("../../u", [0, 1, 2], [1, 2, 3]))
    assert pq.read_table(tmp_path / "data" / "items.parquet")["title"].to_pylist() == titles
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "items.parquet", "manifest.json", "users-00000.parquet"]
