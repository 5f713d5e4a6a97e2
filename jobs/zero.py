"""ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) by accelerate's DeepSpeed plugin, with every setting that it would choose
otherwise, or silently, stated here."""

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config as unset_hf_deepspeed_config

from jobs.options import Launch
from jobs.parallel import MOMENTS, Loss, Tensors, trained

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

if not torch.cuda.is_available():
    __compatible_ops__["deepspeed_shm_comm"] = False  # gloo gives the same losses without minutes of compiling
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names that DeepSpeed calls

BUCKET = 50_000_000
"""Elements in one reduction: DeepSpeed's 500 million would take 2 GB of every process at once."""


def plugin(launch: Launch, clip: float) -> DeepSpeedPlugin:
    """Of accelerate, with the whole configuration of DeepSpeed; the optimiser is torch's AdamW, which needs nothing compiled.

    The plugin clips at 1.0 where nothing is said, and its own ``gradient_clipping=0`` counts as nothing: so it stands here.
    bf16 by autocast over fp32 weights, as in plain data parallelism, and not DeepSpeed's, which trains bf16 copies.
    """
    where = {"device": launch.offload, "pin_memory": launch.offload == "cpu" and torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": launch.zero, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if launch.offload != "none":
        zero["offload_optimizer"] = where
    if launch.offload != "none" and launch.zero == 3:
        zero["offload_param"] = where
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 1,  # only counted by: a micro-batch here has as many rows as it has
            "gradient_accumulation_steps": 1,  # `Sharded.accumulate` says where a step ends
            "gradient_clipping": clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "fp16": {"enabled": False},
            "bf16": {"enabled": False},
        },
        zero3_init_flag=False,
    )


class Sharded:
    """ZeRO: the processes share Adam's moments, from stage 2 the gradients, in stage 3 the weights too."""

    even = True  # a collective in every backward pass

    def __init__(self, accelerator: Accelerator, model: nn.Module, adam: torch.optim.Optimizer, launch: Launch) -> None:
        self._main, self._stage = accelerator.is_main_process, launch.zero
        self._model = model
        if launch.precision == "bf16":
            model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        self._engine, _ = accelerator.prepare(model, adam)
        self._optimizer = self._engine.optimizer
        self.runnable: nn.Module = self._engine

    def accumulate(self, loss: Loss, inputs: Tensors, scale: float, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        summed = loss(self._engine, inputs)
        self._engine.backward(summed * scale)
        return summed.detach()

    def update(self, lr: float, clip: float) -> None:
        assert clip == self._engine.gradient_clipping()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def weights(self) -> Tensors:
        return self._whole("", safe_get_full_fp32_param)

    def moments(self) -> Tensors:
        found: Tensors = {}
        for key in MOMENTS:
            found |= self._whole(f"{key}/", partial(safe_get_full_optimizer_state, optim_state_key=key))
        return found

    def _whole(self, prefix: str, get: Callable[[nn.Parameter], Tensor]) -> Tensors:
        """One parameter at a time, so that no other process ever holds more than one whole."""
        found: Tensors = {}
        for name, p in trained(self._model).items():
            value = get(p)
            if self._main:
                found[f"{prefix}{name}"] = value.detach().cpu().clone()
        return found

    def restore(self, moments: Tensors, step: int) -> None:
        zero = self._optimizer
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for part in flat:  # what torch's AdamW makes at its first step
            zeros = {key: torch.zeros_like(part) for key in MOMENTS}
            zero.optimizer.state[part] = {"step": torch.tensor(float(step)), **zeros}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for name, p in trained(self._model).items():
            for key in MOMENTS:
                value = moments[f"{key}/{name}"].to(flat[0].device)
                if self._stage == 3:
                    safe_set_local_optimizer_state(p, _own_part(p, value), key)
                else:
                    safe_set_full_optimizer_state(p, value, key)

    def finish(self, best: Tensors) -> None:
        whole = {name: best[name] for name in trained(self._model)} if self._main else {}
        if self._stage == 3:  # frozen weights are shared out too, and may have to be saved
            for name, p in self._model.named_parameters():
                if not p.requires_grad:
                    with deepspeed.zero.GatheredParameters([p]):
                        if self._main:
                            whole[name] = p.detach().cpu().clone()
        for name, p in self._model.named_parameters():
            if name in whole:
                p.data = whole[name]


def _own_part(p: Any, value: Tensor) -> Tensor:
    """This process's share of ``value``, in which ZeRO-3 has ``p``: equal parts, the last one filled up with zeros."""
    size = p.ds_tensor.numel()
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    padded = torch.zeros(size * world, dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.flatten()
    return padded[rank * size : (rank + 1) * size]
