"""The command and the environment that start a run.yaml: what a person types, built in one place (docs/launch.md)."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.options import Launch

ROOT = Path(__file__).resolve().parent.parent
STALE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RAY_AUTH_TOKEN")
"""Of another process group, or no job's business."""


def command(run: Mapping[str, Any], module: str, path: Path) -> list[str]:
    """What a person would type for this run.yaml: plain python for one process without ZeRO, else accelerate's launcher.

    ``run``: the file's content; ``module``: the package of the jobs.
    """
    launch = Launch.model_validate(run["launch"])
    job = ["-m", f"{module}.{run['stage']}", str(path)]
    if launch.processes == 1 and launch.zero == 0:
        return [sys.executable, *job]
    # --multi_gpu also on CPU, with ACCELERATE_USE_CPU: `--cpu --num_processes n` would start one process.
    kind = "--use_deepspeed" if launch.zero else "--multi_gpu"
    launcher = [kind, "--num_processes", str(launch.processes), "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the job sets the precision itself, from its run.yaml
    return [sys.executable, "-m", "accelerate.commands.launch", *launcher, *job]


def environment(run: Mapping[str, Any], gpus: int) -> dict[str, str]:
    """This process's environment, changed to what the command needs on ``gpus`` GPUs; 0: on CPU."""
    launch = Launch.model_validate(run["launch"])
    env = {name: value for name, value in os.environ.items() if name not in STALE and not name.startswith("ACCELERATE_")}
    env["OMP_NUM_THREADS"] = str(launch.threads)
    env["TOKENIZERS_PARALLELISM"] = "false"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["GRSCALE_TRIAL"] = "1"
    if gpus == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""  # or it would use a GPU that Ray has given to another stage
        if launch.zero:
            env["DS_ACCELERATOR"] = "cpu"
        elif launch.processes > 1:
            env["ACCELERATE_USE_CPU"] = "true"  # with DeepSpeed it would switch DeepSpeed off
    return env
