"""A study mirrored to object storage: a real S3-compatible server on loopback where moto is installed, and a folder by file://."""

import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from cluster.remote import Mirror
from gr.errors import UserError
from jobs.artifact import MANIFEST, write_manifest


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("no S3 server here: moto[s3], flask and flask-cors are not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < until, "the S3 server did not start"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        return (tmp_path / "bucket" / "study").as_uri()
    host = request.getfixturevalue("server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    bucket = f"b{abs(hash(str(tmp_path)))}"
    made = f"s3://{bucket}/study?endpoint_override={host}&scheme=http&region=us-east-1"
    pafs.FileSystem.from_uri(made + "&allow_bucket_creation=true")[0].create_dir(bucket)
    return made


def artifact(folder: Path, text: str = "weights") -> Path:
    made = folder / "artifacts" / "encode" / "ab12"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "x.bin").write_text(text)
    write_manifest(made, stage="encode", id="ab12", config={}, inputs={}, launch={}, started=0.0, facts={})
    return made


def test_what_one_machine_finished_another_one_has(url: str, tmp_path: Path) -> None:
    with Mirror(url, tmp_path / "one").kept() as one:
        made = artifact(one)
        (one / "metrics").mkdir()
        (one / "metrics" / "p.parquet").write_bytes(b"row")
        (one / "work" / "encode-ab12").mkdir(parents=True)
        (one / "work" / "encode-ab12" / "log.txt").write_text("log")
    with Mirror(url, tmp_path / "two").kept() as two:
        again = two / made.relative_to(one)
        assert (again / "deep" / "x.bin").read_text() == "weights"
        assert (again / MANIFEST).read_bytes() == (made / MANIFEST).read_bytes()
        assert (two / "metrics" / "p.parquet").read_bytes() == b"row"
        assert (two / "work" / "encode-ab12" / "log.txt").read_text() == "log"


def test_a_torn_or_damaged_artifact_is_not_taken_for_whole_and_is_replaced(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Mirror(url, tmp_path / "one")
    made = artifact(first.folder)
    first.push()
    name = f"{first.root}/artifacts/encode/ab12"
    with first.files.open_output_stream(f"{name}/deep/x.bin") as file:
        file.write(b"other")
    second = Mirror(url, tmp_path / "two")
    second.pull()
    assert not (second.folder / "artifacts" / "encode" / "ab12").exists()
    assert "damaged (the checksum of deep/x.bin is not the manifest's)" in capsys.readouterr().err
    artifact(second.folder)  # made again
    second.push()
    third = Mirror(url, tmp_path / "three")
    third.pull()
    assert (third.folder / made.relative_to(first.folder) / "deep" / "x.bin").read_text() == "weights"
    first.files.delete_file(f"{name}/{MANIFEST}")  # of an upload that was killed the files are there, the manifest is not
    fourth = Mirror(url, tmp_path / "four")
    fourth.pull()
    assert not (fourth.folder / "artifacts" / "encode").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from cluster.remote import Mirror
upload, files = Mirror._upload, []
def killed(self, file):
    if files:
        os.kill(os.getpid(), signal.SIGKILL)
    files.append(file)
    upload(self, file)
Mirror._upload = killed
Mirror(sys.argv[1], Path(sys.argv[2])).push()
"""


def test_kill_9_in_the_middle_of_an_upload_is_made_good_by_the_next(url: str, tmp_path: Path) -> None:
    first = Mirror(url, tmp_path / "one")
    artifact(first.folder)
    done = subprocess.run([sys.executable, "-c", KILLED, url, str(tmp_path / "one")], timeout=120)
    assert done.returncode == -9
    second = Mirror(url, tmp_path / "two")
    second.pull()
    assert not (second.folder / "artifacts").exists()
    Mirror(url, tmp_path / "one").push()
    second.pull()
    assert (second.folder / "artifacts" / "encode" / "ab12" / "deep" / "x.bin").read_text() == "weights"


@pytest.mark.parametrize("file", ["../../../../evil", "/evil", "a/../../evil"])
def test_a_foreign_manifest_writes_nowhere_else(url: str, tmp_path: Path, file: str) -> None:
    first = Mirror(url, tmp_path / "one")
    made = artifact(first.folder)
    first.push()
    manifest = json.loads((made / MANIFEST).read_text()) | {"files": {file: "00"}}
    with first.files.open_output_stream(f"{first.root}/artifacts/encode/ab12/{MANIFEST}") as out:
        out.write(json.dumps(manifest).encode())
    second = Mirror(url, tmp_path / "two")
    second.pull()
    assert not list(tmp_path.rglob("evil")) and not (second.folder / "artifacts" / "encode" / "ab12").exists()


def test_mistakes_are_one_line_without_secrets(server: str, tmp_path: Path) -> None:
    url = f"s3://someone:topsecret@nowhere-{tmp_path.name[-6:].replace('_', '-')}/x?endpoint_override={server}&scheme=http"
    with pytest.raises(UserError, match="no such bucket") as caught:
        Mirror(url + "&region=us-east-1", tmp_path).pull()
    assert "topsecret" not in str(caught.value) and "?" not in str(caught.value) and "\n" not in str(caught.value)


DRIVER = """
import sys
from cluster import run as runs
from cluster.cli import main
once = runs.run_study
runs.run_study = lambda loaded, out, ray: once(loaded, out, ray, "fakejobs")
sys.exit(main(sys.argv[1:]))
"""


def grscale(where: Path, *words: str) -> str:
    where.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", DRIVER, *words], cwd=where, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_second_machine_finds_a_study_done(url: str, tmp_path: Path, study_file: Path, fake_jobs: Path) -> None:
    words = ("run", str(study_file), "--out", url, "--set", "seeds=[0]")
    grscale(tmp_path / "one", *words)
    ran = fake_jobs.read_text().splitlines()
    assert {line.split("-")[0] for line in ran} >= {"prepare", "train_sid", "evaluate_sid"}
    fake_jobs.write_text("")
    grscale(tmp_path / "two", *words)
    assert fake_jobs.read_text() == ""
    states = json.loads(grscale(tmp_path / "three", "status", url, "--json"))["points"]
    assert set(states.values()) == {"done"}
    assert "index.html" in grscale(tmp_path / "three", "report", url)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "study.yaml"]
    assert not [path for path in written if b"topsecret" in path.read_bytes() or b"endpoint_override" in path.read_bytes()]
    point = next(name for name in states if "sid-xs" in name)
    grscale(tmp_path / "four", "logs", url, point)
