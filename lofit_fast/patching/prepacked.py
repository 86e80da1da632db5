"""A frozen nn.Linear that multiplies by its weight in oneDNN's layout for a while.

The module stays the object it is, with its weight, its name and its hooks. It is given a forward of its own and what
that computes with, and both are taken away again. The same sums in another order: results differ by rounding alone.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear

from lofit_kernels.prepacked_linear import PrepackedWeight, is_taken, prepacked_linear

WEIGHT = "lofit_prepacked"


def forward(linear: nn.Linear, input: Tensor) -> Tensor:
    """x W^T + b (..., N). By the plain product where the weight is another or trained by now, and as `is_taken` says.

    input: x, which callers may name. The forward's own name is that of the class's, by which a pickle knows it: what is
    loaded from one computes plainly.
    """
    weight, bias, held = linear.weight, linear.bias, getattr(linear, WEIGHT, None)
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    # none is held in a copy, nor by what has kept this forward beyond the scope
    if trained or held is None or weight is not held.weight or not is_taken(input, held, bias):
        return plain_linear(input, weight, bias)
    try:
        return prepacked_linear(input, held, bias)
    except RuntimeError:
        if held.is_open:
            raise
        # another thread has left the scope just now
        return plain_linear(input, weight, bias)


def prepack(linear: nn.Linear, weight: PrepackedWeight) -> None:
    """Give a plain linear its weight in oneDNN's layout. It should not change until `undo_prepack`."""
    vars(linear)[WEIGHT] = weight
    vars(linear)["forward"] = MethodType(forward, linear)


def undo_prepack(linear: nn.Linear, weight: PrepackedWeight) -> None:
    """Undo `prepack` with a weight, if it was done, and forget the weight."""
    own = vars(linear)
    if own.get(WEIGHT) is weight:
        del own[WEIGHT]
        # who has wrapped it has it still
        if _forward_of(linear) is forward:
            del own["forward"]
    weight.close()


def is_prepacked(linear: nn.Module) -> bool:
    """Whether a linear's own forward is this one, and it holds a weight."""
    return _forward_of(linear) is forward and vars(linear).get(WEIGHT) is not None


def is_replaced(linear: nn.Module) -> bool:
    """Whether somebody has given a linear a forward that may compute something else: not the one of its class or ours.

    Copies and pickles of prepacked linears have the latter two; so has what accelerate has taken a hook off.
    """
    return "forward" in vars(linear) and _forward_of(linear) not in (forward, type(linear).forward)


def _forward_of(linear: nn.Module) -> object:
    """The function behind a module's own forward, if it is bound to this module."""
    own = vars(linear).get("forward")
    return getattr(own, "__func__", None) if getattr(own, "__self__", None) is linear else None
