"""Where a module computes, and in what: read off whatever it holds, since a quantized one may have no parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

# dtypes that a product can be computed in; narrower floats are ways to store a weight
COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def device_of(*modules: nn.Module) -> torch.device:
    """Where the first module that holds a tensor computes: its parameters say it, else its buffers and attributes.

    Raises ValueError for weights that are on the meta device, and not brought elsewhere for each forward.
    """
    for module in modules:
        for tensor in _tensors(module):
            # accelerate keeps offloaded weights on meta, and brings them to this device for each forward
            if tensor.device.type == "meta":
                return _execution_device(module)
            return tensor.device
    return torch.device("cpu")


def dtype_of(*modules: nn.Module) -> torch.dtype:
    """What the first module with such parameters computes in; float32 where no parameter says it."""
    parameters = chain.from_iterable(module.parameters() for module in modules)
    return next((p.dtype for p in parameters if p.dtype in COMPUTED_IN), torch.float32)


def is_dense(tensor: object) -> bool:
    """Whether a weight is plain numbers that a product can be computed from: no subclass, nested, sparse or packed."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.dtype in COMPUTED_IN
        and tensor.layout == torch.strided
        and not tensor.is_nested
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """All that a module holds, parameters first."""
    yield from module.parameters()
    yield from module.buffers()
    yield from (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))


def _execution_device(module: nn.Module) -> torch.device:
    hooks: Iterable = (getattr(part, "_hf_hook", None) for part in module.modules())
    device = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), None)
    if device is None:
        raise ValueError("cannot patch a model whose weights are on the meta device: load it first")
    return torch.device(device)
