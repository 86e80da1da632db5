"""Scopes that an op enters only where they change something: each costs as much as a kernel's launch."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast would change what is computed from `x`; never on a device that it does not know, as meta."""
    try:
        return torch.is_autocast_enabled(x.device.type)
    except RuntimeError:
        return False


def as_written(x: Tensor, compute: Callable, *args: Any) -> Any:
    """compute(*args) without autocast: what an op computes in float32 is meant to be."""
    if not autocast_is_on(x):
        return compute(*args)
    with torch.autocast(x.device.type, enabled=False):
        return compute(*args)


def once(backward: Callable) -> Callable:
    """`once_differentiable`, whose scope without gradients is entered only where there are any."""
    refusing = once_differentiable(backward)

    @wraps(backward)
    def run(ctx, *grads):
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
