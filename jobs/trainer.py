"""The one training loop, for every paradigm and stage.

A step is a pure function of the state before it: its batch is f(seed, step, rank), its learning rate f(step), and the random
numbers of dropout are seeded by (seed, step, rank). So a run that was killed and resumed ends like one that was not.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gr.errors import UserError
from jobs.checkpoint import Checkpoints
from jobs.devices import accelerator_for as accelerator_for
from jobs.options import Optimizer
from jobs.parallel import Loss, Parallel, Replicated, Tensors
from jobs.runtime import Context, RunFailed, peak_memory
from jobs.smaller import accumulation, halve, out_of_memory, restart
from jobs.stop import EXIT, StopRequest
from jobs.watch import Watch

M = TypeVar("M", bound=nn.Module)
LOG_SECONDS = 1.0
LEAST_LR = 0.1  # of the peak, at the end of the schedule
DECAY = 0.1  # the share of the steps in which `wsd` decays


@dataclass
class Micro:
    """What one forward pass sees. ``weight``: the targets (or target tokens) its loss is summed over; ``tokens``: those that are
    no padding; ``flops``: counted floating point operations of its forward and backward pass."""

    inputs: dict[str, Tensor]
    weight: float
    tokens: int = 0
    flops: float = 0.0

    @property
    def rows(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass
class Progress:
    """What a checkpoint keeps beside the weights. ``launches``: [first step, processes, zero, accumulation] of every start that
    differed from the one before; ``micro_batch``: rows of the largest micro-batch under the last of these."""

    steps: int = 0
    best_loss: float | None = None
    best_step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    validations: list[list[float]] = field(default_factory=list)
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0
    launches: list[list[int]] = field(default_factory=list)
    micro_batch: int = 0


def learning_rate(optimizer: Optimizer, step: int) -> float:
    """Linear warm-up, then a cosine to `LEAST_LR` of the peak; for `wsd` the peak itself, and an exponential decay in the last
    `DECAY` of the steps."""
    warm = max(1, round(optimizer.warmup * optimizer.steps))
    if step < warm:
        return optimizer.lr * (step + 1) / warm
    if optimizer.schedule == "wsd":
        decay = max(1, round(DECAY * optimizer.steps))
        return optimizer.lr * float(LEAST_LR ** max(0.0, (step - (optimizer.steps - decay)) / decay))
    done = (step - warm) / max(1, optimizer.steps - warm)
    return optimizer.lr * (LEAST_LR + (1 - LEAST_LR) * 0.5 * (1 + math.cos(math.pi * done)))


Batches = Callable[[int, int], list[Micro]]
"""(step, accumulation) -> this process's micro-batches; ``accumulation`` makes them that many times smaller."""


def train(
    context: Context[Any],
    accelerator: Accelerator,
    model: M,
    optimizer: Optimizer,
    seed: int,
    batches: Batches,
    loss: Loss,
    validate: Callable[[nn.Module], float],
    recordable: bool = False,
) -> M:
    """Trains ``model`` and returns it with the weights that `Optimizer.keep` says (on the first process; others may hold none).

    ``validate(model)``: mean validation loss, over the same data on every process. ``recordable``: ``loss`` reads nothing back
    from a GPU and its inputs have few shapes, as `launch.graphs` needs it. What was measured goes into ``context.facts``.
    Raises RunFailed when a loss is NaN or infinite. Does not return where memory runs out: the process starts again with smaller
    micro-batches (`jobs.smaller`); nor when SIGTERM or SIGUSR1 reached any process: all save after the step and exit with 143.
    """
    trainer = _Trainer(context, accelerator, model, optimizer, seed, batches, loss, validate, recordable)
    try:
        trainer.run()
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            halve(context, trainer.accumulation, trainer.progress.micro_batch, error)
        if accelerator.num_processes > 1:
            time.sleep(2.0)  # a collective breaks off when a neighbour that ran out of memory leaves it
            if accumulation(context) > trainer.accumulation:
                restart(context)
        raise
    _report(context, optimizer, trainer)
    model.eval()
    return model


class _Trainer:
    """One process's part of one training."""

    def __init__(
        self,
        context: Context[Any],
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        seed: int,
        batches: Batches,
        loss: Loss,
        validate: Callable[[nn.Module], float],
        recordable: bool,
    ) -> None:
        self.context, self.accelerator, self.optimizer, self.seed = context, accelerator, optimizer, seed
        self.model, self.batches, self.loss, self.validate = model, batches, loss, validate
        self.accumulation = accumulation(context)
        self.graphs = _graphs(context, accelerator, recordable)
        self.progress, self.best = Progress(), Tensors()
        self.ahead: tuple[int, list[Micro]] = -1, []  # the micro-batches of a step to come
        self.stop = StopRequest()
        self.checkpoints = Checkpoints(context, accelerator)
        every = range(1, optimizer.validations + 1)
        self.validate_at = {round(optimizer.steps * i / optimizer.validations) for i in every}

    def run(self) -> None:
        """From the newest checkpoint, if there is one, to the last step, and the best weights into the model."""
        start = self._prepare()
        with self.stop.caught():
            self._steps(start)
        self.parallel.finish(self.best)
        self.accelerator.wait_for_everyone()

    def _steps(self, start: int) -> None:
        watch = Watch(self.context, self.accumulation)
        logged = -math.inf
        for step in range(start, self.optimizer.steps):
            if self._patience_is_over():  # before the step, so that a resumed run sees it too
                self.context.log(event="stopped early", step=step, steps=self.optimizer.steps)
                break
            self.progress.steps = step + 1
            began = time.monotonic()
            with watch.during("step", step + 1):
                mean, checkpoint_due, stop = self._step(step)
            self.progress.seconds += time.monotonic() - began
            row: dict[str, Any] = {"step": step + 1, "steps": self.optimizer.steps, "loss": mean}
            if step + 1 in self.validate_at:
                with watch.during("validation", step + 1):
                    row["loss_val"] = self._validate(step + 1)
            if time.monotonic() - logged > LOG_SECONDS or "loss_val" in row:
                self.context.log(**row, lr=learning_rate(self.optimizer, step), seconds=round(self.progress.seconds, 3))
                logged = time.monotonic()
            if checkpoint_due or stop:
                with watch.during("checkpoint", step + 1):
                    self._save(step + 1)
            if stop:
                self.context.log(event="stopped", step=step + 1, steps=self.optimizer.steps)
                self.accelerator.wait_for_everyone()  # none may leave while the first one still writes
                sys.exit(EXIT)

    def _patience_is_over(self) -> bool:
        patience, progress = self.optimizer.patience, self.progress
        return patience is not None and sum(step > progress.best_step for step, _ in progress.validations) >= patience

    def _prepare(self) -> int:
        """Wraps model and optimiser, restored from the newest checkpoint; returns the number of steps done."""
        checkpoint = self.checkpoints.newest()
        if checkpoint:
            self.model.load_state_dict(checkpoint.weights(), strict=False)  # before they are shared out
            self.progress, self.best = Progress(**checkpoint.progress), checkpoint.best()
        adam = adam_of(self.model, self.optimizer, self.accelerator.device, self.context.run.launch.zero == 0, self.graphs)
        self.parallel = _share_out(self.context, self.accelerator, self.model, adam, self.graphs)
        start = checkpoint.step if checkpoint else 0
        self.progress.steps = start
        if checkpoint:
            self.parallel.restore(checkpoint.moments(), start)
            self.context.log(event="resumed", step=start, steps=self.optimizer.steps, processes=self.accelerator.num_processes)
        launch = [self.accelerator.num_processes, self.context.run.launch.zero, self.accumulation]
        if not self.progress.launches or self.progress.launches[-1][1:] != launch:
            self.progress.launches.append([start, *launch])
            self.progress.micro_batch = 0
        return start

    def _step(self, step: int) -> tuple[float, bool, bool]:
        """One optimiser step; returns the mean loss over the global batch, and, agreed on by all, whether a checkpoint is due and
        whether one of them was asked to stop."""
        accelerator, progress = self.accelerator, self.progress
        torch.manual_seed(hash((self.seed, step, accelerator.process_index)) % 2**63)
        micros = self._micros(step)
        progress.micro_batch = max([progress.micro_batch, *(m.rows for m in micros)])
        sums = [sum(m.weight for m in micros), sum(m.tokens for m in micros), sum(m.flops for m in micros)]
        ahead = accelerator.gather(self._numbers([*sums, len(micros), self.checkpoints.due(), self.stop.asked])[None])
        weight, tokens, flops = ahead[:, :3].sum(0).tolist()
        passes = int(ahead[:, 3].max()) if self.parallel.even else len(micros)
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for i in range(passes):
            real = i < len(micros)  # else a pass whose gradient is zero, beside a process that has more
            inputs = {name: value.to(accelerator.device) for name, value in micros[i if real else 0].inputs.items()}
            scale = accelerator.num_processes / weight if real else 0.0
            summed = self.parallel.accumulate(self.loss, inputs, scale, i + 1 == passes)
            total += summed.double() * real
        self.parallel.update(learning_rate(self.optimizer, step), self.optimizer.clip)
        progress.tokens += int(tokens)
        progress.flops += flops
        if step + 1 < self.optimizer.steps:
            self.ahead = step + 1, self.batches(step + 1, self.accumulation)  # while a GPU still works at this step
        mean = (accelerator.reduce(total, "sum") / weight).item()
        if not math.isfinite(mean):
            raise RunFailed(f"loss is {mean} at step {step + 1} of {self.optimizer.steps}")
        return mean, bool(ahead[0, 4]), bool(ahead[:, 5].any())

    def _micros(self, step: int) -> list[Micro]:
        made, micros = self.ahead
        return micros if made == step else self.batches(step, self.accumulation)

    def _numbers(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)

    def _validate(self, step: int) -> float:
        """Measures the validation loss, and keeps the weights if it is the least so far, or if the last are asked for."""
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            own = self.validate(self.parallel.runnable)
        value = float(self.accelerator.gather(self._numbers([own]))[0])  # the first process's: all must decide alike
        if not math.isfinite(value):
            raise RunFailed(f"validation loss is {value} at step {step}")
        self.progress.validations.append([step, value])
        if self.progress.best_loss is None or value < self.progress.best_loss or self.optimizer.keep == "last":
            self.progress.best_loss, self.progress.best_step = value, step
            self.best = self.parallel.weights()
        return value

    def _save(self, step: int) -> None:
        seconds = self.checkpoints.save(step, asdict(self.progress), self.parallel, self.best)
        self.progress.checkpoints += 1
        self.progress.checkpoint_seconds += seconds


def _graphs(context: Context[Any], accelerator: Accelerator, recordable: bool) -> bool:
    """Whether steps are to be recorded; UserError where they can't be."""
    if context.run.launch.graphs and not recordable:
        raise UserError(f"run.yaml: launch.graphs: {context.run.stage} of this kind can't be recorded; leave it out")
    if context.run.launch.graphs and accelerator.device.type != "cuda":
        raise UserError("run.yaml: launch.graphs needs a CUDA device, and this machine has none; leave it out")
    return context.run.launch.graphs


def adam_of(model: nn.Module, optimizer: Optimizer, device: torch.device, fused: bool, graphs: bool) -> torch.optim.AdamW:
    """AdamW; on a GPU ``fused``, all weights in a few kernels, and for ``graphs`` with its rate where a graph reads it."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=torch.tensor(optimizer.lr, device=device) if graphs else optimizer.lr,
        weight_decay=optimizer.weight_decay,
        betas=(0.9, 0.98),
        fused=True if fused and device.type == "cuda" else None,  # None leaves the choice to torch, False would forbid foreach
        capturable=graphs,
    )


def _share_out(
    context: Context[Any], accelerator: Accelerator, model: nn.Module, adam: torch.optim.Optimizer, graphs: bool
) -> Parallel:
    if context.run.launch.zero == 0:
        return Replicated(accelerator, model, adam, graphs)
    from jobs.zero import Sharded  # imports DeepSpeed

    return Sharded(accelerator, model, adam, context.run.launch)


def _report(context: Context[Any], optimizer: Optimizer, trainer: _Trainer) -> None:
    progress = trainer.progress
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    context.facts.update(
        steps=progress.steps,
        stopped_early=progress.steps < optimizer.steps,
        best_step=progress.best_step,
        loss_val=progress.best_loss,
        validations=progress.validations,
        train_tokens=progress.tokens,
        train_flops=progress.flops,
        train_seconds=round(progress.seconds, 3),
        peak_memory_bytes=peak,
        lr=optimizer.lr,
        lr_choice=optimizer.lr_choice,
        accumulation=trainer.accumulation,
        micro_batch=progress.micro_batch,
        launches=progress.launches,
        checkpoints=progress.checkpoints,
        checkpoint_seconds=round(progress.checkpoint_seconds, 3),
        device=str(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
    )
