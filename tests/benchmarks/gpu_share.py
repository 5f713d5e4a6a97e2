"""How many small rungs should train on one GPU side by side: targets per second of all together, by their number.

    python tests/benchmarks/gpu_share.py [--only 336K --only 13M] [--together 1,2,4,8,16] [--seconds 5] [--graphs] [--mps]

Processes that train the same SID recommender (T5-style, the sizes of `tests/benchmarks/gpu.py sid`; bf16, batches of 256, made in
Python in between as the jobs do) are started once; 1, 2, 4, ... of them then train for the same seconds, while the others wait.
Amazon Beauty, or where it is not there a planted world of its size. A small model's step is hundreds of kernels that each take
less time than a process needs to start them: one process leaves the GPU idle in between, and several fill the gaps.

`--mps` starts NVIDIA's Multi-Process Service for these processes and ends it after: kernels of several then run at the same time,
not in turns. It changes nothing on the GPU itself.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr.data.split import Split
from gr.sid.sids import SidTable

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "GRSCALE_SHARED_FOLDER"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a size of the ladder; may be given several times (336K, 3.3M and 13M)")
    parser.add_argument("--together", default="1,2,4,8,16")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small planted world and one small size, for tests")
    parser.add_argument("--graphs", action="store_true", help="record steps as CUDA graphs (launch.graphs)")
    parser.add_argument("--mps", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device here (--device cpu --tiny runs a small version on the CPU)")
        return 0
    counts = [int(n) for n in options.together.split(",")]
    rows = []
    service = multi_process_service() if options.mps else contextlib.nullcontext({})
    with service as environment, tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.tiny)
        for size in ["tiny"] if options.tiny else options.only or ["336K", "3.3M", "13M"]:
            rows.append([size, *together(size, counts, options, environment | {FOLDER: folder})])
            print(" ".join(rows[-1]), flush=True)
    print(f"\n{options.device}{', with MPS' if options.mps else ''}: targets per second of n processes together (x one alone)\n")
    print("| size | " + " | ".join(f"n = {n}" for n in counts) + " |\n|" + "---|" * (len(counts) + 1))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return 0


def prepare(folder: Path, tiny: bool) -> None:
    """The split and the SIDs that all train on."""
    from tests.benchmarks.gpu import split_of
    from tests.benchmarks.gpu_sid import WIDTH, semantic_ids

    split, _ = split_of(folder, tiny)
    sids = semantic_ids(split, 4 if tiny else WIDTH)
    np.savez(folder / "sids.npz", tokens=sids.tokens, vocab=sids.vocab)


@contextlib.contextmanager
def multi_process_service() -> Iterator[dict[str, str]]:
    """The environment of processes that share a GPU by a service of their own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=os.environ | environment, check=True)
        try:
            yield environment
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=os.environ | environment, check=True)


def together(size: str, counts: list[int], options: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """A row's cells."""
    flags = ["--device", options.device, "--batch", str(options.batch), "--seconds", str(options.seconds)]
    command = [sys.executable, __file__, "--worker", size, *flags, *(["--tiny"] if options.tiny else [])]
    command += ["--graphs"] if options.graphs else []
    workers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
        )
        for _ in range(max(counts))
    ]
    try:
        for worker in workers:
            answer(worker)
        rates = []
        for count in counts:
            for worker in workers[:count]:
                print("train", file=worker.stdin, flush=True)
            rates.append(sum(float(answer(worker)) for worker in workers[:count]))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [f"{rate:,.0f} ({rate / rates[0]:.2f})" for rate in rates]


def answer(worker: Any) -> str:
    for line in worker.stdout:
        if line.startswith("= "):
            return str(line.removeprefix("= "))
    raise SystemExit("a process ended; its last words stand above")


def work(options: argparse.Namespace) -> int:
    """One of the processes: trains for a while whenever it is told to, and says how many targets per second it did."""
    from tests.benchmarks.gpu import Device, Training
    from tests.benchmarks.gpu_sid import LADDER, TINY_SIZE, contender, size_of

    torch.set_num_threads(1)
    device, folder = Device(options.device, None, options.graphs), Path(os.environ[FOLDER])
    saved = np.load(folder / "sids.npz")
    size = TINY_SIZE if options.worker == "tiny" else size_of(*LADDER[options.worker])
    sids = SidTable(saved["tokens"], int(saved["vocab"]))
    made = contender(size, "encoder-decoder", Split(folder / "split"), sids, device.accelerator, options.batch, 1)
    training, step = Training(made, device), 0

    def train() -> float:
        nonlocal step
        micros = training.on_device(step)
        training.step(micros)
        step += 1
        device.seconds(lambda: None)  # a job reads every step's loss, too
        return sum(micro.weight for micro in micros)

    for _ in range(20):  # steps are recorded
        train()
    print("= ready", flush=True)
    for _ in sys.stdin:
        began, targets = time.perf_counter(), 0.0
        while time.perf_counter() - began < options.seconds:
            targets += train()
        print(f"= {targets / (time.perf_counter() - began)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # run as a script, it finds its other half
    sys.exit(main())
