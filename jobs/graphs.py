"""CUDA graphs of a training step: recorded once, a step's kernels are started by one call.

A small model's step is a thousand kernels that each take the GPU less time than the processor needs to start one. What is
recorded is bound to shapes and addresses: so for each shape of inputs there is a graph, inputs are copied to where it reads
them, and gradients stay where they are. (https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".)
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Shapes = tuple[tuple[str, torch.Size], ...]
FIRST = 2  # runs of a shape without a graph: libraries set themselves up in them
MOST = 32  # shapes; more have none
logger = logging.getLogger(__name__)


class Graphs:
    """Runs ``work`` on tensors, by a graph where there is one for their shapes.

    ``work``: reads nothing back from the GPU, and draws random numbers from torch's own generator only. What it returns is
    copied. If it can't be recorded, a warning says so, and it goes on without.
    """

    def __init__(self, work: Callable[[Tensors], Tensor]) -> None:
        self._work = work
        self._runs: dict[Shapes, int] = {}
        self._graphs: dict[Shapes, tuple[torch.cuda.CUDAGraph, Tensors, Tensor]] = {}
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._off = False

    def __call__(self, inputs: Tensors) -> Tensor:
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        runs = self._runs[shapes] = self._runs.get(shapes, 0) + 1
        if shapes not in self._graphs and (self._off or runs <= FIRST or len(self._graphs) == MOST):
            return self._eager(inputs)
        if shapes not in self._graphs and not self._record(shapes, inputs):
            return self._eager(inputs)
        graph, own, result = self._graphs[shapes]
        for name, value in inputs.items():
            own[name].copy_(value)
        graph.replay()
        return result.clone()

    def _eager(self, inputs: Tensors) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # what the graph is recorded on
            result = self._work(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _record(self, shapes: Shapes, inputs: Tensors) -> bool:
        graph, own = torch.cuda.CUDAGraph(), {name: value.clone() for name, value in inputs.items()}
        try:
            # Other threads (`jobs.watch`) may do as they like meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = self._work(own)
        except RuntimeError as error:
            logger.warning("no CUDA graph of this step, which goes on without: %s", str(error).splitlines()[0])
            self._off = True
            return False
        self._graphs[shapes] = graph, own, result
        return True
