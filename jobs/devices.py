"""The accelerator of a process, checked against what its run.yaml asked for: a launcher that was told too little trains the wrong
thing without a word (docs/launch.md lists how)."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from gr.errors import UserError
from jobs.options import Launch, Optimizer
from jobs.runtime import Context
from jobs.smaller import accumulation, rejoin


def accelerator_for(context: Context[Any], optimizer: Optimizer) -> Accelerator:
    """The accelerator of this process, with ZeRO where the run asks for it.

    UserError when the group that formed has another number of processes, or is of another kind, than ``launch`` says.
    """
    launch = context.run.launch
    torch.set_num_threads(launch.threads)
    use_cuda = torch.cuda.is_available()
    backend = "nccl" if use_cuda else "gloo"
    _check_environment(launch)
    rejoin(backend, accumulation(context))
    accelerator = _zero(launch, optimizer, backend) if launch.zero else _plain(launch, use_cuda, backend)
    _check(accelerator, launch, use_cuda)
    return accelerator


def _plain(launch: Launch, use_cuda: bool, backend: str) -> Accelerator:
    # DDP orders its buckets anew after a process's first step, and what three or more processes sum up depends on the order, so a
    # resumed run would not end bitwise like an undisturbed one. Where that is promised, on CPU, the search for unused weights
    # keeps it from doing so.
    group = [InitProcessGroupKwargs(backend=backend), DistributedDataParallelKwargs(find_unused_parameters=not use_cuda)]
    return Accelerator(
        cpu=not use_cuda,
        mixed_precision="bf16" if launch.precision == "bf16" else "no",
        kwargs_handlers=group if int(os.environ.get("WORLD_SIZE", "1")) > 1 else [],
    )


def _zero(launch: Launch, optimizer: Optimizer, backend: str) -> Accelerator:
    from jobs.zero import plugin, unset_hf_deepspeed_config  # DeepSpeed is imported for those who asked for it only

    # Without an explicit backend DeepSpeed on CPU reads the world size as 1.
    accelerator = Accelerator(
        deepspeed_plugin=plugin(launch, optimizer.clip),
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
    )
    # Or from_pretrained would give weights that are shared out already, whatever the plugin's zero3_init_flag says, and they can
    # neither be counted nor adapted. They are shared out when the model is whole.
    unset_hf_deepspeed_config()
    return accelerator


def _check_environment(launch: Launch) -> None:
    """UserError where accelerate would form another kind of group than was asked for, or break off in the attempt."""
    if launch.zero and "LOCAL_RANK" not in os.environ:
        raise UserError("run.yaml: launch.zero needs accelerate's launcher: accelerate launch --use_deepspeed --num_processes N")
    if launch.zero and _is_set("ACCELERATE_USE_CPU"):
        raise UserError("run.yaml: launch.zero: ACCELERATE_USE_CPU switches DeepSpeed off; leave it unset, also on CPU")
    if not launch.zero and _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("run.yaml: launch.zero is 0, but accelerate was told to use DeepSpeed; leave --use_deepspeed out")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _check(accelerator: Accelerator, launch: Launch, use_cuda: bool) -> None:
    """UserError unless the group is the one that was asked for."""
    how = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" if not use_cuda else "accelerate launch --multi_gpu"
    if launch.zero:
        how = "accelerate launch --use_deepspeed"
    if accelerator.num_processes != launch.processes:
        raise UserError(
            f"launch.processes is {launch.processes}, but accelerate formed a group of {accelerator.num_processes};"
            f" start it with {how} --num_processes {launch.processes}"
        )
    many = DistributedType.MULTI_GPU if use_cuda else DistributedType.MULTI_CPU
    wanted = {DistributedType.DEEPSPEED} if launch.zero else {many} if launch.processes > 1 else {many, DistributedType.NO}
    if accelerator.distributed_type not in wanted:
        raise UserError(
            f"launch.zero is {launch.zero}, but accelerate formed a group of type {accelerator.distributed_type.value};"
            f" start it with {how} --num_processes {launch.processes}, and without a configuration file of accelerate's"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"accelerate was told to accumulate {accelerator.gradient_accumulation_steps} steps, and would divide the loss;"
            " unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS and give launch.accumulation instead"
        )
