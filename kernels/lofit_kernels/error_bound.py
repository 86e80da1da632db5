"""The accuracy rule of the project: how far a result may be from the exact one.

    error against float64 <= max(2 x the error of eager PyTorch in the same dtype, 1 ulp at the largest exact value)

The error of a long sum depends on the order of its terms. One order is a single draw: eager may be lucky in it, and a
kernel that is just as exact then fails. What the rule means is the error of eager's method, so a sum over tokens is
computed by eager in several orders (`orders`), and the largest of these errors counts.

A check that runs once on a machine nobody has seen, with another vendor's order of every sum, adds `sum_margin`: what
rounding alone may do to a sum that is accumulated in float32, whatever the order of its terms. It covers nothing else:
a result that is rounded to 16 bits is judged by its one unit in the last place.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# orders of one sum that eager is judged by
ORDERS = 8
# the chance that a right sum is further off than its margin, for a whole tensor
CHANCE = 1e-6


class Stage(NamedTuple):
    """Sums of one length: how many roundings each has, and the mean square of what is rounded, summed over them.

    roundings: additions and the product before each of them, at most n + 1 for n terms. squares: (elements,) float64,
    for each element the sum over its sums of this stage of |x|^2 + S^2, with terms x and result S.
    """

    roundings: int
    squares: Tensor


def sum_margin(*stages: Stage, dtype: torch.dtype = torch.float32) -> float:
    """How far rounding alone may take the largest element of a sum that is accumulated in `dtype`.

        lambda u sqrt(sum over stages of roundings * squares),   lambda = sqrt(2 ln(2 elements / CHANCE))

    Derivation. The error of a floating-point sum is, to first order in the unit roundoff u = eps / 2, the sum over its
    additions of delta_k s_k, with |delta_k| <= u and s_k the partial sum that addition k rounds (Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd edition, equation 4.2); a product that is rounded before it is added is one
    more such term. Rounding errors that are independent and have mean zero give by Hoeffding's inequality

        P(|error| > lambda u sqrt(sum_k s_k^2)) <= 2 exp(-lambda^2 / 2)

    (Higham and Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019, theorem
    2.4: the square root of n in the place of n). A partial sum of terms in random order is on its way from 0 to S, so
    that its mean square is at most S^2 + |x|^2 / 4, after any number of terms; a tree has partial sums of fewer terms
    and no more additions. So sum_k s_k^2 <= n (|x|^2 + S^2) with room to spare. Errors of stages, and of the sums
    within one, are independent and add up in squares. The chance is shared among the elements of the tensor.

    Returns 0 for no elements.
    """
    total = sum(stage.roundings * stage.squares for stage in stages)
    if total.numel() == 0:
        return 0.0
    spread = math.sqrt(2 * math.log(2 * total.numel() / CHANCE))
    return spread * torch.finfo(dtype).eps / 2 * total.max().sqrt().item()


def projection_margins(
    z: Tensor, weight: Tensor, grad: Tensor, scale: Tensor | None, offset: Tensor | None
) -> dict[str, float]:
    """`sum_margin` of all that a projection y = ((1 + a) z + v) W^T computes: "y", "dz", "da" and "dv".

    z: (T, K); weight: (N, K); grad: (T, N), that of y; scale, offset: (K,) with zeros where a head has none, or None.
    y and dz are sums over columns, accumulated in float32 and rounded to z's dtype; where that is one of 16 bits, the
    last rounding is all that counts and their margin is 0. da = sum_t G z and dv = sum_t G with G = dY W stay in
    float32; dv may be summed over tokens first or over columns first, and the larger margin holds.
    """
    (T, K), N = z.shape, len(weight)
    z, w, dy = z.detach().double(), weight.detach().double(), grad.detach().double()
    a, v = (0.0 if x is None else x.detach().double() for x in (scale, offset))
    g = dy @ w
    # of each sum over the columns of N: |terms|^2 + result^2
    columns = dy.square() @ w.square() + g.square()
    da, dv, summed = (g * z).sum(0), g.sum(0), dy.sum(0)
    columns_first = Stage(N + 1, columns.sum(0)), Stage(T + 1, g.square().sum(0) + dv.square())
    tokens = dy.square().sum(0) + summed.square()
    tokens_first = (
        Stage(T + 1, tokens @ w.square()),
        Stage(N + 1, summed.square() @ w.square() + dv.square()),
    )
    found = {
        "da": sum_margin(
            Stage(N + 1, (z.square() * columns).sum(0)), Stage(T + 1, (g * z).square().sum(0) + da.square())
        ),
        "dv": max(sum_margin(*columns_first), sum_margin(*tokens_first)),
    }
    if weight.dtype.itemsize < torch.float32.itemsize:
        return {"y": 0.0, "dz": 0.0, **found}
    # a path may add z, a z and v as terms of their own
    terms = z.square() + (a * z).square() + v**2 * torch.ones_like(z)
    y = ((1 + a) * z + v) @ w.T
    return {
        "y": sum_margin(Stage(3 * K + 2, terms @ w.square().T + y.square())),
        "dz": sum_margin(Stage(N + 2, (1 + a) ** 2 * columns)),
        **found,
    }


def allowed_error(expected: Tensor, *eager: Tensor, margin: float = 0.0) -> float:
    """The largest absolute error that the rule allows.

    expected: the exact result in float64, any shape. eager: what eager PyTorch gives for it, one tensor of that shape
    for each order of the same sum, all in the output's dtype. margin: what is added to the rule, see `sum_margin`.
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
    return bound_of(worst, expected.abs().max().item(), dtypes.pop()) + margin


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
    # whatever the default device is
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    given = tuple(torch.arange(length, device=cpu) for length in lengths)
    shuffled = [
        tuple(torch.randperm(length, generator=generator, device=cpu) for length in lengths) for _ in range(ORDERS - 1)
    ]
    return [tuple(order.to(device) for order in row) for row in (given, *shuffled)]
