"""What the processes of a group send each other: collectives and their bytes, seen as they are dispatched."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")
_WAITING = ("wait_tensor", "barrier", "monitored_barrier_")


class CollectiveBytes(TorchDispatchMode):
    """A scope that counts `times` and `bytes` by the collective's name; bytes are of the tensors that it is given.

    Of a gather into one tensor that is the tensor of all, as every process has it at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.split("::")[0] in _COLLECTIVES and name.split("::")[1] not in _WAITING:
            # the first is written to, or the only one
            given = tree_leaves(out if name.startswith("_c10d") else args[0])
            tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
            self.times[name] += 1
            self.bytes[name] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return out
