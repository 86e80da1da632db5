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


def forward_prepacked(linear: nn.Linear, x: Tensor) -> Tensor:
    """x W^T + b (..., N). By the plain product where x is not float32, or the weight is another or trained by now."""
    weight, bias, held = linear.weight, linear.bias, linear.lofit_prepacked
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if trained or weight is not held.weight or not is_taken(x):
        return plain_linear(x, weight, bias)
    return prepacked_linear(x, held, bias)


def prepack(linear: nn.Linear, weight: PrepackedWeight) -> None:
    """Give a plain linear its weight in oneDNN's layout. It must not change until `undo_prepack`."""
    vars(linear)[WEIGHT] = weight
    vars(linear)["forward"] = MethodType(forward_prepacked, linear)


def undo_prepack(linear: nn.Linear) -> None:
    """Undo `prepack`, if it was done."""
    own = vars(linear)
    if is_prepacked(linear):
        del own["forward"]
    weight = own.pop(WEIGHT, None)
    if weight is not None:
        weight.close()


def is_prepacked(linear: nn.Module) -> bool:
    """Whether a linear's own forward is this one."""
    own = vars(linear)
    return WEIGHT in own and getattr(own.get("forward"), "__func__", None) is forward_prepacked
