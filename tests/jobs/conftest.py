"""Codes for the tests of how a job is launched."""

import numpy as np
import pytest

from gr.sid.sids import disambiguate, write_sids
from tests.conftest import WORLD, Jobs


@pytest.fixture(scope="session")
def launch_sids(jobs: Jobs) -> str:
    """At random: how a job is launched does not depend on what codes mean."""
    folder = jobs.folder / "artifacts" / "launch-sids"
    folder.mkdir(parents=True)
    write_sids(folder / "sids.parquet", disambiguate(np.random.default_rng(0).integers(0, 8, (WORLD["items"], 2))))
    return folder.name
