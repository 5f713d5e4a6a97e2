"""How the processes of a training share a model: `Replicated` (one process, or DDP) here, `jobs.zero.Sharded` by DeepSpeed.

Both have the same methods, and give the same checkpoint and the same final weights: whole tensors by parameter name.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from jobs.graphs import Graphs

Tensors = dict[str, Tensor]
Loss = Callable[[nn.Module, Tensors], Tensor]
"""(model, inputs) -> the *sum* of the loss over a micro-batch's targets."""
SCALE = "scale"  # among the inputs of a recorded pass
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, as torch names them."""


class Parallel(Protocol):
    """The methods that all processes call together. ``even``: every process must have equally many micro-batches."""

    even: bool
    runnable: nn.Module

    def accumulate(self, loss: Loss, inputs: Tensors, scale: float, last: bool) -> Tensor:
        """Adds the gradient of ``scale`` x ``loss`` of ``inputs``; returns that loss, detached.

        ``last``: the micro-batch before `update`.
        """

    def update(self, lr: float, clip: float) -> None:
        """Adam's step, with gradients clipped to the norm ``clip`` over all weights."""

    def weights(self) -> Tensors:
        """Copies of the trained weights, whole and in main memory, on the first process; empty on the others."""

    def moments(self) -> Tensors:
        """Likewise Adam's moments, as ``exp_avg/<parameter>``."""

    def restore(self, moments: Tensors, step: int) -> None:
        """Puts Adam's moments back, as they were after ``step`` steps."""

    def finish(self, best: Tensors) -> None:
        """Puts ``best`` into the first process's model, whole, for saving."""


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained; shared ones once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Replicated:
    """Every process holds the whole model and Adam's moments."""

    even = False

    def __init__(self, accelerator: Accelerator, model: nn.Module, adam: torch.optim.Optimizer, graphs: bool = False) -> None:
        """``graphs``: a step is recorded as CUDA graphs; for one process, and a capturable ``adam`` whose rate is a tensor."""
        self._accelerator = accelerator
        self._wrapped, self._adam = accelerator.prepare(model, adam)
        self.runnable: nn.Module = accelerator.unwrap_model(self._wrapped)
        self._graphs = graphs
        self._passes: Graphs | None = None
        self._updates: Graphs | None = None

    def accumulate(self, loss: Loss, inputs: Tensors, scale: float, last: bool) -> Tensor:
        if self._graphs:
            self._passes = self._passes or Graphs(lambda own: self._pass(loss, own))
            return self._passes(inputs | {SCALE: torch.tensor(scale, device=self._accelerator.device)})
        if last:
            summed = loss(self._wrapped, inputs)
            self._accelerator.backward(summed * scale)
        else:
            with self._accelerator.no_sync(self._wrapped):
                summed = loss(self._wrapped, inputs)
                self._accelerator.backward(summed * scale)
        return summed.detach()

    def _pass(self, loss: Loss, inputs: Tensors) -> Tensor:
        summed = loss(self._wrapped, {name: value for name, value in inputs.items() if name != SCALE})
        self._accelerator.backward(summed * inputs[SCALE])
        return summed.detach()

    def update(self, lr: float, clip: float) -> None:
        if self._graphs:
            self._updates = self._updates or Graphs(lambda own: self._update(own["lr"], clip))
            self._updates({"lr": torch.tensor(lr, device=self._accelerator.device)})
            return
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._accelerator.clip_grad_norm_(self._wrapped.parameters(), clip)
        self._adam.step()
        self._adam.zero_grad()

    def _update(self, lr: Tensor, clip: float) -> Tensor:
        for group in self._adam.param_groups:
            group["lr"].copy_(lr)
        norm: Tensor = self._accelerator.clip_grad_norm_(self._wrapped.parameters(), clip)
        self._adam.step()
        self._adam.zero_grad(set_to_none=False)  # a graph adds to gradients where they were when it was recorded
        return norm

    def weights(self) -> Tensors:
        if not self._accelerator.is_main_process:
            return {}
        return {name: p.detach().cpu().clone() for name, p in trained(self.runnable).items()}

    def moments(self) -> Tensors:
        if not self._accelerator.is_main_process:
            return {}
        state = self._adam.state
        return {
            f"{key}/{name}": state[p][key].detach().cpu().clone()
            for name, p in trained(self.runnable).items()
            if p in state  # a weight that no loss has reached has none
            for key in MOMENTS
        }

    def restore(self, moments: Tensors, step: int) -> None:
        fused = self._adam.param_groups[0]["fused"]
        for name, p in trained(self.runnable).items():
            if f"{MOMENTS[0]}/{name}" in moments:
                self._adam.state[p] = {"step": torch.tensor(float(step), device=p.device if fused else "cpu")}
                self._adam.state[p] |= {key: moments[f"{key}/{name}"].to(p.device) for key in MOMENTS}

    def finish(self, best: Tensors) -> None:
        self.runnable.load_state_dict(best, strict=False)
