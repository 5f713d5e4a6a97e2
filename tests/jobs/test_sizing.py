"""`launch: auto`: what it picks fits, wastes no device, and says so where nothing fits."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gr.errors import UserError
from jobs.options import Launch
from jobs.sizing import FEW_TOKENS, ROOM, Work, activation_bytes, choose, process_bytes

WORK = st.builds(
    lambda weights, share, row, batch: Work(weights, int(weights * share), row, batch * 8, weights // 30),
    st.integers(10**4, 10**11),
    st.floats(0.001, 1),
    st.floats(10**4, 10**9),
    st.integers(1, 256),
)
GIB = 2.0**30


@given(WORK, st.floats(GIB, 200 * GIB), st.integers(1, 8))
def test_what_is_chosen_fits_and_no_fewer_processes_would(work: Work, memory: float, devices: int) -> None:
    try:
        launch = choose(work, device_bytes=memory, devices=devices)
    except UserError as error:
        least = Launch(processes=1 << (devices.bit_length() - 1), zero=3, offload="cpu", accumulation=4096)
        assert process_bytes(work, least) > ROOM * memory, "something would have fitted"
        assert "launch: auto" in str(error) and "GiB" in str(error)
        return
    assert process_bytes(work, launch) <= ROOM * memory and launch.processes <= devices
    if launch.processes > 1 and launch.offload == "none":
        alone = Launch(accumulation=max(1, work.global_batch // 8))
        assert process_bytes(work, alone) > ROOM * memory, "one device would have done"


@given(WORK, st.floats(GIB, 100 * GIB), st.integers(1, 8))
@example(Work(10_000, 10_000, 241571911.0, 8, 333), GIB, 2)  # half the memory: single rows on one device; then all rows on two
def test_more_memory_never_takes_a_worse_launch(work: Work, memory: float, devices: int) -> None:
    """Offloading is the worst, then micro-batches cut to a few rows, then more devices."""

    def worse(launch: Launch) -> tuple[bool, bool, int]:
        rows = work.rows(launch.processes, launch.accumulation) * work.row_tokens
        return launch.offload == "cpu", launch.accumulation > 1 and rows < FEW_TOKENS, launch.processes

    try:
        less = choose(work, device_bytes=memory, devices=devices)
    except UserError:
        return
    assert worse(choose(work, device_bytes=2 * memory, devices=devices)) <= worse(less)


def test_what_a_few_known_sizes_get() -> None:
    """A tiny rung is plain; 7 billion trained weights (112 GB of state) take 4 devices of 80 GiB; LoRA on them fits one."""
    row = activation_bytes(layers=32, d_model=4096, heads=32, tokens=512, vocab=32000)
    seven = Work(7 * 10**9, 7 * 10**9, row, 256, 4096 * 32000, row_tokens=512)
    assert choose(Work(10**6, 10**6, 10**6, 256), device_bytes=16 * GIB, devices=8) == Launch()
    full = choose(seven, device_bytes=80 * GIB, devices=8)
    assert (full.processes, full.zero, full.offload) == (4, 3, "none")
    lora = choose(seven._replace(trained=20 * 10**6), device_bytes=80 * GIB, devices=8)
    assert (lora.processes, lora.zero) == (1, 0) and lora.accumulation > 1
    with pytest.raises(UserError, match="the least that a device would need"):
        choose(seven, device_bytes=GIB, devices=1)


def test_zero_shares_what_it_says() -> None:
    work = Work(10**9, 10**9, 0.0, 8)
    sizes = [process_bytes(work, Launch(processes=8, zero=stage)) for stage in (1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)
    assert process_bytes(work, Launch()) == 16 * 10**9, "weights, gradients and two moments in fp32"
    assert sizes[2] - process_bytes(work._replace(weights=0, trained=0), Launch(processes=8, zero=3)) == 20 * 10**9 / 8
