"""Both paradigms on one GPU: training throughput, model FLOPs utilisation, memory and users decoded per second, by size.

    python tests/benchmarks/gpu.py [sid|llm] [--only 43M] [--steps 20] [--users 512] [--graphs] [--peak-tflops 989]

`sid`: the paper's ten sizes (336K to 192M; arXiv 2509.25522) as T5-style encoder-decoders and as decoder-only models of as many
parameters, trained and decoded over the catalogue. `llm`: a ladder of fresh Qwen3-architecture backbones, 1M to 300M, trained
whole, and one of Qwen3-0.6B's shape with random weights in bf16 and LoRA of 1%, with scaled-dot-product attention and, where
flash-attn is installed, with flash attention. Data: Amazon Beauty, or where it is not there a planted world of its size.

The batches, losses and searches are the jobs' own, training in bf16 (accelerate's autocast, fp32 weights, AdamW, gradients
clipped), decoding as the evaluations do, in the weights' type. Times are of the device, between two synchronisations. Tokens
count without padding; so do FLOPs (2 per weight and token forward, twice that backward, attention's pairs; docs/protocol.md), of
which the share of the device's dense bf16 peak is the utilisation (MFU; Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"with host" also holds the making of the batches in Python, which the jobs do in between. A size that does not fit says so in
its row. The last thing printed is the table in Markdown.

Without a GPU it says so and ends; `--device cpu --tiny` runs all of it in small, for tests: its numbers mean nothing.
"""

import argparse
import gc
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from gr.data.planted import World
from gr.data.split import EvaluationUser, Split
from jobs.graphs import FIRST
from jobs.options import Optimizer
from jobs.parallel import Replicated
from jobs.smaller import out_of_memory
from jobs.trainer import Micro, adam_of

BEAUTY = World(users=22_363, items=12_101, mean_length=9)
TINY = World(users=120, items=60, topics=6, communities=4, subtopics=2, mean_length=8)
BATCH = 128
"""Users decoded at once: the evaluations' default."""
PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181,
    "L4": 121, "A10": 125, "A40": 150, "A6000": 155, "4090": 165, "3090": 71,
}  # fmt: skip
"""Dense bf16 TFLOP/s of the makers' data sheets, by a part of the device's name; the first that fits counts."""


def peak_of(device: str) -> float | None:
    """TFLOP/s of a device by its name; None where it is not among `PEAKS`."""
    return next((tflops for part, tflops in PEAKS.items() if re.search(rf"\b{part}\b", device)), None)


Rank = Callable[[list[EvaluationUser]], object]


@dataclass
class Contender:
    """A size: how a step's batches are made, what is trained on them, and what makes the ranking of users (None: it is not
    measured)."""

    parameters: int
    unit: str
    """Of the micro-batches' weights."""
    model: nn.Module
    batches: Callable[[int], list[Micro]]
    loss: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
    decoder: Callable[[], Rank] | None
    recordable: bool = False
    """Whether a job can record its steps."""


class Device:
    """The device that is measured, and its ``peak`` in FLOP/s, None where it is not known; ``graphs``: steps are recorded where
    they can be, as with `launch.graphs`."""

    def __init__(self, kind: str, peak_tflops: float | None, graphs: bool) -> None:
        self.graphs = graphs and kind == "cuda"
        self.cuda = kind == "cuda"
        self.accelerator = Accelerator(cpu=not self.cuda, mixed_precision="bf16")
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU"
        peak = peak_tflops or peak_of(self.name)
        self.peak = peak * 1e12 if peak else None

    @property
    def where(self) -> torch.device:
        return self.accelerator.device

    def seconds(self, work: Callable[[], object]) -> float:
        self._synchronize()
        began = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @contextmanager
    def memory(self) -> Iterator[Callable[[], str]]:
        """The largest memory allocated since the block began, in words."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        yield lambda: f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if self.cuda else ""

    def empty(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


class Training:
    """The steps that `jobs.trainer` makes, without its validations and checkpoints."""

    def __init__(self, contender: Contender, device: Device) -> None:
        self.contender, self.accelerator = contender, device.accelerator
        graphs = contender.recordable and device.graphs
        optimizer = Optimizer(steps=1, global_batch=8, lr=1e-4, weight_decay=0.01)
        adam = adam_of(contender.model.train(), optimizer, device.where, fused=True, graphs=graphs)
        self.parallel = Replicated(device.accelerator, contender.model, adam, graphs)

    def on_device(self, step: int) -> list[Micro]:
        micros = self.contender.batches(step)
        for micro in micros:
            micro.inputs = {name: tensor.to(self.accelerator.device) for name, tensor in micro.inputs.items()}
        return micros

    def step(self, micros: list[Micro]) -> None:
        total = sum(micro.weight for micro in micros)
        for micro in micros:
            self.parallel.accumulate(self.contender.loss, micro.inputs, 1 / total, micro is micros[-1])
        self.parallel.update(1e-4, 1.0)


def measured(make: Callable[[], Contender], device: Device, steps: int, users: list[EvaluationUser]) -> dict[str, str]:
    """One row of the table; what did not fit is told in it."""
    device.empty()
    row: dict[str, str] = {}
    try:
        contender = make()
        row["parameters"] = f"{contender.parameters:,}"
        row |= _trained(contender, device, steps)
        if contender.decoder is not None:
            row |= _decoded(contender, contender.decoder, device, users)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        row["users/s" if "tokens/s" in row else "tokens/s"] = "out of memory"
    return row


def _trained(contender: Contender, device: Device, steps: int) -> dict[str, str]:
    with device.memory() as most:
        training = Training(contender, device)
        ready = [training.on_device(step) for step in range(steps)]
        for _ in range(FIRST + 1):  # libraries set themselves up, steps are recorded
            for micros in ready:
                training.step(micros)
        alone = device.seconds(lambda: [training.step(micros) for micros in ready])
        done = [micro for micros in ready for micro in micros]
        whole = device.seconds(lambda: [training.step(training.on_device(step)) for step in range(steps)])
        peak = most()
    tokens, weight, flops = (sum(getattr(micro, name) for micro in done) for name in ("tokens", "weight", "flops"))
    return {
        f"{contender.unit}/s": f"{weight / alone:,.0f}",
        "tokens/s": f"{tokens / alone:,.0f}",
        "tokens/s with host": f"{tokens / whole:,.0f}",
        "TFLOP/s": f"{flops / alone / 1e12:.3g}",
        "MFU": f"{flops / alone / device.peak:.1%}" if device.peak else "",
        "memory": peak,
    }


@torch.no_grad()
def _decoded(contender: Contender, decoder: Callable[[], Rank], device: Device, users: list[EvaluationUser]) -> dict[str, str]:
    contender.model.eval().zero_grad(set_to_none=True)
    rank = decoder()
    device.empty()
    with device.memory() as most:
        rank(users[:BATCH])  # warms up
        parts = [users[start : start + BATCH] for start in range(0, len(users), BATCH)]
        took = device.seconds(lambda: [rank(part) for part in parts])
        return {"users/s": f"{len(users) / took:,.0f}", "memory, decoding": most()}


def markdown(rows: list[dict[str, str]]) -> str:
    """Columns in the order of their first appearance; those that are empty throughout are left out."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row.get(name, "") for name in names) + " |" for row in rows)])


def split_of(folder: Path, tiny: bool) -> tuple[Split, str]:
    """A leave-one-out split, and what it is of."""
    from tests.benchmarks.beauty import DATA, leave_one_out

    world = TINY if tiny else None if DATA.is_dir() else BEAUTY
    return leave_one_out(folder, world), "a planted world" if world else "Amazon Beauty"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paradigm", nargs="?", choices=("sid", "llm"), help="both, one after the other, where left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small size, a few steps")
    parser.add_argument("--only", action="append", help="a size of the ladder; may be given several times")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--batch", type=int, default=256, help="training units of a step: targets, or users (decoder-only, LLM)")
    parser.add_argument("--graphs", action="store_true", help="record steps as CUDA graphs where a job can (launch.graphs)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 TFLOP/s of the device, where its name is not known")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device here (--device cpu --tiny runs a small version on the CPU)")
        return 0
    for paradigm in (options.paradigm,) if options.paradigm else ("sid", "llm"):
        compare(paradigm, options)
    return 0


def compare(paradigm: str, options: argparse.Namespace) -> None:
    """Measures all sizes of one paradigm and prints their table."""
    if paradigm == "sid":
        from tests.benchmarks.gpu_sid import contenders
    else:
        from tests.benchmarks.gpu_llm import contenders
    device = Device(options.device, options.peak_tflops, options.graphs)
    steps, count, batch = (2, 8, 16) if options.tiny else (options.steps, options.users, options.batch)
    with tempfile.TemporaryDirectory() as folder:
        split, data = split_of(Path(folder), options.tiny)
        users = list(split.evaluation_users("test", limit=count))
        rows = []
        for names, make in contenders(split, device.accelerator, batch, options.beams, options.tiny, options.only):
            rows.append(names | measured(make, device, steps, users))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    peak = f"dense bf16 peak {device.peak / 1e12:.0f} TFLOP/s" if device.peak else "peak not known: give --peak-tflops for MFU"
    print(f"\n{data}; {device.name}, {peak}; torch {torch.__version__}; {steps} steps of {batch}, {len(users)} users, ", end="")
    print(f"{options.beams} beams\n\n{markdown(rows)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it finds its other half
    sys.exit(main())
