"""`launch: auto`: processes, ZeRO stage, accumulation and offloading from counted parameters, batch and memory."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from gr.data.split import STREAMS
from gr.errors import UserError
from jobs.options import Launch

BUFFERS = 600_000_000
"""Bytes that DeepSpeed's reduction and gathering buffers take at most (three of `jobs.zero.BUCKET` in fp32)."""
ROOM = 0.9
"""The share of a device's memory that is planned with: allocators fragment, and the arithmetic is not exact."""
FEW_TOKENS = 2048
"""Of a micro-batch, below which a device is badly used; fewer are planned only where nothing else fits, or where a large
vocabulary leaves a micro-batch less than twice as many."""
Offload = Literal["none", "cpu"]
Precision = Literal["fp32", "bf16"]


class Work(NamedTuple):
    """``weights`` and of them ``trained``: counted parameters; ``row_bytes``: activations of one row (`activation_bytes`);
    ``largest``: parameters of the largest layer, which ZeRO-3 makes whole to compute with; ``most_rows``: of a micro-batch that
    accumulation has not made smaller; ``row_tokens``: of one row."""

    weights: int
    trained: int
    row_bytes: float
    global_batch: int
    largest: int = 0
    most_rows: int = 10**9
    row_tokens: int = 256

    def rows(self, processes: int, accumulation: int) -> int:
        """Of one micro-batch."""
        return -(-min(-(-self.global_batch // processes), self.most_rows) // accumulation)


def activation_bytes(layers: int, d_model: int, heads: int, tokens: int, vocab: int, bytes_per_value: int = 4) -> float:
    """Bytes that the backward pass of one sequence needs kept, without recomputation.

    s b h (34 + 5 a s / h) per layer for 2-byte values (Korthikanti et al. 2022, arXiv 2205.05198, equation 2), and the logits,
    their log-probabilities and their gradient.
    """
    per_layer = tokens * (34 * d_model + 5 * heads * tokens) * bytes_per_value / 2
    return layers * per_layer + 3 * 4 * tokens * vocab


def process_bytes(work: Work, launch: Launch) -> float:
    """Bytes on the device of one process: weights, gradients, Adam's moments, all in fp32, and one micro-batch's activations.

    Under ZeRO DeepSpeed keeps a second copy of the trained weights, shared out, which the optimiser works on. What is offloaded
    (the optimiser's; in stage 3 the weights too) is not counted.
    """
    n, stage = launch.processes, launch.zero
    weights, gradients, optimiser = 4.0 * work.weights, 4.0 * work.trained, 8.0 * work.trained
    if stage:
        optimiser = 0.0 if launch.offload == "cpu" else (optimiser + 4.0 * work.trained) / n
    elif n > 1:
        gradients *= 2  # DDP's buckets
    if stage >= 2:
        gradients /= n
    if stage == 3:
        weights = (0.0 if launch.offload == "cpu" else weights / n) + 2 * 4.0 * work.largest
    rows = work.rows(n, launch.accumulation)
    return weights + gradients + optimiser + (BUFFERS if stage else 0) + rows * work.row_bytes


def choose(work: Work, *, device_bytes: float, devices: int, threads: int = 1, precision: Precision = "fp32") -> Launch:
    """The launch that fits: fewest processes first, then the least ZeRO stage, then the least accumulation.

    ``device_bytes`` of each of ``devices`` devices. A micro-batch of few rows is taken only where more devices don't help, and
    offloading only after that. UserError where nothing fits; it says how much the smallest would need.
    """
    launches = list(_launches(work, devices, threads, precision))
    for launch in launches:
        if process_bytes(work, launch) <= ROOM * device_bytes:
            return launch
    least = min(process_bytes(work, launch) for launch in launches)
    raise UserError(
        f"launch: auto: {work.weights:,} parameters and rows of {work.row_bytes / 2**20:.0f} MiB don't fit on {devices} device(s)"
        f" of {device_bytes / 2**30:.1f} GiB: the least that a device would need is {least / ROOM / 2**30:.1f} GiB"
    )


def _launches(work: Work, devices: int, threads: int, precision: Precision) -> Iterator[Launch]:
    counts = [n for n in range(1, min(devices, STREAMS) + 1) if STREAMS % n == 0]
    few = min(-(-FEW_TOKENS // work.row_tokens), max(1, work.most_rows // 2))
    passes: list[tuple[int, Offload]] = [(few, "none"), (1, "none"), (1, "cpu")]
    for least_rows, offload in passes:
        for n in counts:
            for stage in (1, 2, 3) if offload == "cpu" else (0, 2, 3) if n > 1 else (0,):
                accumulation = 1
                while accumulation == 1 or work.rows(n, accumulation // 2) >= 2 * least_rows:
                    yield Launch(
                        processes=n, threads=threads, precision=precision, zero=stage, offload=offload, accumulation=accumulation
                    )
                    accumulation *= 2
