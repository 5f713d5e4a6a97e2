"""The cheapest of the fault matrix's cells, on the smallest study; `python -m tests.faults.matrix` runs them all."""

from pathlib import Path

import pytest

from tests.faults.cells import CELLS, Cell, run_cell
from tests.faults.matrix import undisturbed
from tests.faults.study import Study

CHOSEN = {
    "kill -9 of the Tune worker, `quantize` at work",
    "kill -9 of the driver, `train_sid` training, no checkpoint yet",
    "SIGTERM to everything, `quantize` at work",
    "every checkpoint with a flipped bit, `train_sid` training, after a checkpoint",
}
ONE_RUNG = ["--set", "llm=null", "--set", "sid.ladder=[{name: one, layers: 1, d_model: 16, heads: 2, d_kv: 8, d_ff: 32}]"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), ONE_RUNG)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if f"{cell.fault}, {cell.when}" in CHOSEN], ids=lambda cell: cell.fault)
def test_the_same_command_completes_the_study_with_the_same_metrics(base: Study, cell: Cell, tmp_path: Path) -> None:
    outcome = run_cell(base, cell, tmp_path / "cell")
    assert outcome.wrong == ""


def test_the_chosen_cells_are_there() -> None:
    assert {f"{cell.fault}, {cell.when}" for cell in CELLS if f"{cell.fault}, {cell.when}" in CHOSEN} == CHOSEN
