"""The accuracy rule of the project: how far a result may be from the exact one.

    error against float64 <= max(2 x the error of eager PyTorch in the same dtype, 1 ulp at the largest exact value)

The error of a long sum depends on the order of its terms. One order is a single draw: eager may be lucky in it, and a
kernel that is just as exact then fails. What the rule means is the error of eager's method, so a sum over tokens is
computed by eager in several orders (`orders`), and the largest of these errors counts.
"""

import math

import torch
from torch import Tensor

# orders of one sum that eager is judged by
ORDERS = 8


def allowed_error(expected: Tensor, *eager: Tensor) -> float:
    """The largest absolute error that the rule allows.

    expected: the exact result in float64, any shape. eager: what eager PyTorch gives for it, one tensor of that shape
    for each order of the same sum, all in the output's dtype.
    Raises TypeError when expected is not float64, ValueError when eager is missing or has mixed dtypes or other shapes.
    """
    if expected.dtype != torch.float64:
        raise TypeError(f"expected the exact result in torch.float64, got {expected.dtype}")
    dtypes = {x.dtype for x in eager}
    if len(dtypes) != 1 or any(x.shape != expected.shape for x in eager):
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in eager) or "none"
        raise ValueError(f"expected eager results of one dtype and of shape {tuple(expected.shape)}, got {got}")
    if expected.numel() == 0:
        return 0.0
    worst = max(largest_error(x, expected) for x in eager)
    return bound_of(worst, expected.abs().max().item(), dtypes.pop())


def bound_of(eager_error: float, largest: float, dtype: torch.dtype) -> float:
    """The rule in numbers: twice eager's error, or one unit in the last place of `dtype` at `largest` if more."""
    # eps spans a whole binade upwards: one ulp at m is eps times the power of two below m
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0
    return max(2 * eager_error, ulp)


def largest_error(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference to expected (float64, got's shape); NaN where got has one, 0 of no elements."""
    return (got.double() - expected).abs().max().item() if got.numel() else 0.0


def orders(*lengths: int, device: torch.device | str | None = None) -> list[tuple[Tensor, ...]]:
    """ORDERS orders in which to add up the same sums: the given one first, then random ones, always the same.

    lengths: of the dimensions that are summed over, such as T tokens, or T tokens and the N columns that G = dY W sums
    over. Returns for each order one int64 permutation (length,) per dimension, on `device`.
    """
    generator = torch.Generator().manual_seed(0)
    given = tuple(torch.arange(length) for length in lengths)
    shuffled = [tuple(torch.randperm(length, generator=generator) for length in lengths) for _ in range(ORDERS - 1)]
    return [tuple(order.to(device) for order in row) for row in (given, *shuffled)]
