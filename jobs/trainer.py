"""The one training loop, for every paradigm and stage.

A step is a pure function of the state before it: its batch is f(seed, step, rank), its learning rate f(step), and the random
numbers of dropout are seeded by (seed, step, rank). So a run that was killed and resumed ends like one that was not.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from gr.errors import UserError
from jobs.checkpoint import Checkpoints
from jobs.config import Optimizer
from jobs.runtime import Context, RunFailed, peak_memory

M = TypeVar("M", bound=nn.Module)
CHECKPOINT_SECONDS = float(os.environ.get("GRSCALE_CHECKPOINT_SECONDS", "60"))
LOG_SECONDS = 1.0
LEAST_LR = 0.1  # of the peak, at the end of the cosine


@dataclass
class Micro:
    """What one forward pass sees. ``weight``: the targets (or target tokens) its loss is summed over; ``tokens``: those that are
    no padding; ``flops``: counted floating point operations of its forward and backward pass."""

    inputs: dict[str, Tensor]
    weight: float
    tokens: int = 0
    flops: float = 0.0


@dataclass
class Progress:
    """What a checkpoint keeps beside the weights."""

    best_loss: float | None = None
    best_step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    validations: list[list[float]] = field(default_factory=list)


def learning_rate(optimizer: Optimizer, step: int) -> float:
    """Linear warm-up, then a cosine to `LEAST_LR` of the peak."""
    warm = max(1, round(optimizer.warmup * optimizer.steps))
    if step < warm:
        return optimizer.lr * (step + 1) / warm
    done = (step - warm) / max(1, optimizer.steps - warm)
    return optimizer.lr * (LEAST_LR + (1 - LEAST_LR) * 0.5 * (1 + math.cos(math.pi * done)))


def accelerator_for(context: Context[Any], precision: str) -> Accelerator:
    """The accelerator of this process, checked against what the run asked for."""
    torch.set_num_threads(context.run.launch.threads)
    use_cuda = torch.cuda.is_available()
    # DDP orders its buckets anew after a process's first step, and what three or more processes sum up depends on the order, so a
    # resumed run would not end bitwise like an undisturbed one. Where that is promised, on CPU, the search for unused weights
    # keeps it from doing so.
    group = [
        InitProcessGroupKwargs(backend="nccl" if use_cuda else "gloo"),
        DistributedDataParallelKwargs(find_unused_parameters=not use_cuda),
    ]
    accelerator = Accelerator(
        cpu=not use_cuda,
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=group if int(os.environ.get("WORLD_SIZE", "1")) > 1 else [],
    )
    if accelerator.num_processes != context.run.launch.processes:
        raise UserError(
            f"launch.processes is {context.run.launch.processes}, but accelerate formed a group of {accelerator.num_processes};"
            " on CPU start it with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return accelerator


def train(
    context: Context[Any],
    accelerator: Accelerator,
    model: M,
    optimizer: Optimizer,
    seed: int,
    batches: Callable[[int], list[Micro]],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    validate: Callable[[nn.Module], float],
) -> M:
    """Trains ``model`` and returns it, unwrapped, with the weights of its least validation loss.

    ``batches(step)``: this process's micro-batches; ``loss(model, inputs)``: the *sum* of the loss over a micro-batch's targets;
    ``validate(model)``: mean validation loss, the same on every process. Writes what it measured into ``context.facts``.
    Raises RunFailed when a loss is NaN or infinite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapped, adam = accelerator.prepare(
        model,
        torch.optim.AdamW(parameters, lr=optimizer.lr, weight_decay=optimizer.weight_decay, betas=(0.9, 0.98)),
    )
    checkpoints = Checkpoints(context, accelerator)
    progress, best, start = Progress(), dict[str, Tensor](), 0
    restored = checkpoints.load()
    if restored:
        start, state, best = restored
        progress = Progress(**state)
        context.log(event="resumed", step=start, steps=optimizer.steps)
    validate_at = {round(optimizer.steps * (i + 1) / optimizer.validations) for i in range(optimizer.validations)}
    saved = logged = time.monotonic()
    for step in range(start, optimizer.steps):
        began = time.monotonic()
        mean, checkpoint_due = _step(
            accelerator, wrapped, adam, optimizer, seed, step, batches(step), loss, progress, began - saved
        )
        if not math.isfinite(mean):
            raise RunFailed(f"loss is {mean} at step {step + 1} of {optimizer.steps}")
        progress.seconds += time.monotonic() - began
        row: dict[str, Any] = {"step": step + 1, "steps": optimizer.steps, "loss": round(mean, 6)}
        if step + 1 in validate_at:
            best = _validate(accelerator, wrapped, validate, progress, step + 1, best)
            row["loss_val"] = progress.validations[-1][1]
        if time.monotonic() - logged > LOG_SECONDS or step + 1 in validate_at or step == start:
            context.log(**row, lr=learning_rate(optimizer, step), seconds=round(progress.seconds, 3))
            logged = time.monotonic()
        if checkpoint_due:
            checkpoints.save(step + 1, progress.__dict__, best)
            saved = time.monotonic()
    unwrapped: M = accelerator.unwrap_model(wrapped)
    unwrapped.load_state_dict(best, strict=False)
    _report(context, optimizer, progress)
    accelerator.wait_for_everyone()
    unwrapped.eval()
    return unwrapped


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    adam: torch.optim.Optimizer,
    optimizer: Optimizer,
    seed: int,
    step: int,
    micros: list[Micro],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    progress: Progress,
    since_checkpoint: float,
) -> tuple[float, bool]:
    """One optimiser step; returns the mean loss over the global batch, and whether a checkpoint is due (agreed on by all)."""
    torch.manual_seed(hash((seed, step, accelerator.process_index)) % 2**63)
    for group in adam.param_groups:
        group["lr"] = learning_rate(optimizer, step)
    device = accelerator.device
    ahead = torch.tensor(
        [
            sum(m.weight for m in micros),
            sum(m.tokens for m in micros),
            sum(m.flops for m in micros),
            float(since_checkpoint > CHECKPOINT_SECONDS),
        ],
        dtype=torch.float64,
        device=device,
    )
    ahead = accelerator.reduce(ahead, "sum")
    weight = ahead[0].item()
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, micro in enumerate(micros):
        inputs = {name: value.to(device) for name, value in micro.inputs.items()}
        if i + 1 < len(micros):
            with accelerator.no_sync(model):
                summed = loss(model, inputs)
                accelerator.backward(summed * (accelerator.num_processes / weight))
        else:
            summed = loss(model, inputs)
            accelerator.backward(summed * (accelerator.num_processes / weight))
        total += summed.detach().double()
    accelerator.clip_grad_norm_(model.parameters(), optimizer.clip)
    adam.step()
    adam.zero_grad()
    progress.tokens += int(ahead[1])
    progress.flops += ahead[2].item()
    return (accelerator.reduce(total, "sum") / weight).item(), bool(ahead[3] > 0)


def _validate(
    accelerator: Accelerator,
    wrapped: nn.Module,
    validate: Callable[[nn.Module], float],
    progress: Progress,
    step: int,
    best: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Measures the validation loss; returns a copy of the trained weights if it is the least so far, else ``best``."""
    model: nn.Module = accelerator.unwrap_model(wrapped)
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        value = validate(model)
    if not math.isfinite(value):
        raise RunFailed(f"validation loss is {value} at step {step}")
    progress.validations.append([step, value])
    if progress.best_loss is None or value < progress.best_loss:
        progress.best_loss, progress.best_step = value, step
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        state = model.state_dict()
        return {name: state[name].detach().cpu().clone() for name in state if name in trained}
    return best


def _report(context: Context[Any], optimizer: Optimizer, progress: Progress) -> None:
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    context.facts.update(
        steps=optimizer.steps,
        best_step=progress.best_step,
        loss_val=progress.best_loss,
        validations=progress.validations,
        train_tokens=progress.tokens,
        train_flops=progress.flops,
        train_seconds=round(progress.seconds, 3),
        peak_memory_bytes=peak,
        lr=optimizer.lr,
        lr_choice=optimizer.lr_choice,
        device=str(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
    )
