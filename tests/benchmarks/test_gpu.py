"""The benchmark for a GPU runs, in small and without one, so that it still does when there is one."""

import subprocess
import sys

import pytest
import torch

from tests.benchmarks.gpu import peak_of
from tests.conftest import ROOT


def test_peaks_go_by_the_devices_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA L40S": 362,
        "NVIDIA L4": 121,
    }
    assert {name: peak_of(name) for name in names} == names
    assert [peak_of(name) for name in ("CPU", "NVIDIA RTX A4000")] == [None, None], "better none than another's"


def run(*words: str, program: str = "gpu.py") -> str:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / program), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert run("sid") == "skipped: no CUDA device here (--device cpu --tiny runs a small version on the CPU)\n"


@pytest.mark.slow
def test_sharing_in_small() -> None:
    done = run("--device", "cpu", "--tiny", "--together", "1,2", "--seconds", "1", "--batch", "16", program="gpu_share.py")
    header, _, row = done.splitlines()[-3:]
    assert header == "| size | n = 1 | n = 2 |"
    size, alone, both = row.strip("| ").split(" | ")
    assert size == "tiny" and alone.endswith("(1.00)") and float(alone.split()[0].replace(",", "")) > 0
    assert float(both.split()[0].replace(",", "")) > 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("paradigm", "rows", "unit"), [("sid", 2, "targets/s"), ("llm", 2, "title tokens/s")])
def test_in_small(paradigm: str, rows: int, unit: str) -> None:
    table = [line.split(" | ") for line in run(paradigm, "--device", "cpu", "--tiny", "--peak-tflops", "0.001").splitlines()]
    start = next(i for i, line in enumerate(table) if len(line) > 5)
    names = [name.strip("| ") for name in table[start]]
    assert {"parameters", unit, "tokens/s", "tokens/s with host", "TFLOP/s", "MFU", "users/s"} <= set(names)
    for cells in table[start + 2 : start + 2 + rows]:
        row = dict(zip(names, (cell.strip("| ") for cell in cells), strict=True))
        assert all(row.values()), "no cell is empty"
        assert float(row["MFU"].rstrip("%")) > 0 and float(row["tokens/s"].replace(",", "")) > 0
    assert len(table) == start + 2 + rows, "the table is the last thing printed"
