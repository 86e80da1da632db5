"""A frozen nn.Linear whose products are computed in 8 bits for a while, in passes that build a graph and in no others.

One whose weight is trained meanwhile computes in full, so that the weight has its gradient.

The module stays the object it is, with its weight, its name and its hooks. It is given a forward of its own and what
that computes with, and both are taken away again.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as full_linear

from lofit_kernels.product_kinds import ProductKind
from lofit_kernels.quantized_linear import FrozenWeight, FullColumns, quantized_linear

PRODUCTS = "lofit_products"


def forward_in_8_bits(linear: nn.Linear, input: Tensor) -> Tensor:
    """x W^T + b (..., N): in 8 bits where a graph is built, in full where none is, as in evaluation.

    input: x, which callers may name. In full too where the weight is trained by now: products in 8 bits give it no
    gradient.
    """
    if not torch.is_grad_enabled() or linear.weight.requires_grad:
        return full_linear(input, linear.weight, linear.bias)
    return quantized_linear(input, own_products(linear), linear.bias)


def own_products(linear: nn.Linear) -> FrozenWeight:
    """What a linear in 8 bits multiplies by. Raises RuntimeError where it has been given another weight since."""
    products = linear.lofit_products
    if products.weight is not linear.weight:
        raise RuntimeError(
            f"a linear was given another weight after its own was {products.done}: set weights before {products.scope}"
        )
    return products


def compute_in_8_bits(linear: nn.Linear, kind: ProductKind, columns: FullColumns | None = None) -> None:
    """Give a plain linear products of a kind. Its weight must not change until `compute_in_full`.

    columns: those of its inputs that are multiplied in full.
    """
    vars(linear)[PRODUCTS] = FrozenWeight(linear.weight, kind, columns)
    vars(linear)["forward"] = MethodType(forward_in_8_bits, linear)


def compute_in_full(linear: nn.Linear) -> None:
    """Undo `compute_in_8_bits`, if it was done."""
    own = vars(linear)
    if products_of(linear) is not None:
        del own["forward"]
    products = own.pop(PRODUCTS, None)
    if products is not None:
        products.close()


def products_of(linear: nn.Module) -> FrozenWeight | None:
    """What a linear computes its products with, if it does so in 8 bits."""
    own = vars(linear)
    ours = PRODUCTS in own and getattr(own.get("forward"), "__func__", None) is forward_in_8_bits
    return own[PRODUCTS] if ours else None
