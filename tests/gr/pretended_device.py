"""A device that is pretended, to run on any machine what is written for a GPU.

Its tensors are computed on the CPU, but say that they are elsewhere, and as on a GPU an operation that finds some of its tensors
there and others on the CPU is refused. The device calls itself "meta", for autograd knows that one without any hardware.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PRETENDED = torch.device("meta")
COPIES = ("aten._to_copy.default", "aten.copy_.default")
INDEXED = ("aten.index.Tensor", "aten.index_put_.default", "aten._index_put_impl_.default")
"""Operations on tensors of two devices that a GPU does: copies, and indices on the CPU of what is there."""


class There(torch.Tensor):
    """A tensor on the pretended device; ``here``: the one on the CPU that holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "There":
        how = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype, "device": PRETENDED}
        made: There = torch.Tensor._make_wrapper_subclass(cls, here.shape, **how)
        made.here = here
        return made

    def tolist(self) -> list[Any]:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees the operations that make tensors, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    name, asked = str(func), kwargs.get("device")
    strangers = [x for x in tensors if not isinstance(x, There) and x.dim()]
    if there and strangers and name not in COPIES and not (name in INDEXED and isinstance(args[0], There)):
        raise RuntimeError(f"{name}: tensors on two devices, {tuple(strangers[0].shape)} on the CPU")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    out = func(*args, **kwargs)
    goes = torch.device(asked) == PRETENDED if asked is not None else bool(there)
    if not goes:
        return out.clone() if there and name in COPIES else out  # a copy to the CPU shares nothing
    same = {id(x.here): x for x in there}  # what was written in place is the tensor that it was
    return tree_map(lambda x: (same[id(x)] if id(x) in same else There(x)) if isinstance(x, torch.Tensor) else x, out)


@contextmanager
def pretended_device() -> Iterator[None]:
    """While it lasts, what is sent to `PRETENDED` is there. Inference mode, which such tensors know not, is no_grad then."""
    from gr.sid import decode

    with pytest.MonkeyPatch.context() as patch, _Factories():
        from_data = torch.tensor
        patch.setattr(
            torch, "tensor", lambda data, *, device=None, **kw: from_data(data, **kw).to(device if device is not None else "cpu")
        )
        patch.setattr(decode, "rank_sids", torch.no_grad()(decode.rank_sids.__wrapped__))
        yield
