"""Inputs of the public functions by case of heads, and what a hook in eager PyTorch makes of them."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lofit_kernels.error_bound import orders

H, N, T = 4, 40, 9
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOATS = ("z", "weight", "bias", "scale", "offset")

# heads of (scale, offset); None: no such component
HEADS = {
    "offset_all": (None, [0, 1, 2, 3]),
    "offset_some": (None, [1, 3]),
    "offset_none": (None, []),
    "scale_all": ([0, 1, 2, 3], None),
    "scale_some": ([2], None),
    "scale_none": ([], None),
    "both_all": ([0, 1, 2, 3], [0, 1, 2, 3]),
    "both_different": ([0, 3], [1, 2, 3]),
    "both_none": ([], []),
}


def forms_of(case: str) -> tuple[str, ...]:
    return ("fold",) if HEADS[case][0] is None else ("pass", "delta")


CASE_FORMS = [(case, form) for case in HEADS for form in forms_of(case)]


def make(case: str, dtype: torch.dtype, D: int = 64, bias: bool = True, rows: tuple[int, ...] = (T,)) -> dict:
    """Inputs of order one, already rounded to the dtypes they are used in."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "z": torch.randn(*rows, H * D).to(dtype),
        "weight": (torch.randn(N, H * D) / (H * D) ** 0.5).to(dtype),
        "bias": torch.randn(N).to(dtype) if bias else None,
    }
    for name, heads in zip(("scale", "offset"), HEADS[case], strict=True):
        inputs[name] = None if heads is None else (0.3 * torch.randn(len(heads), D)).to(wide)
        inputs[f"{name}_heads"] = None if heads is None else torch.tensor(heads, dtype=torch.int64)
    return inputs


def doubled(inputs: dict) -> dict:
    return {k: v.detach().double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


def eager(z, weight, bias, scale, scale_heads, offset, offset_heads) -> Tensor:
    """What a hook with wide parameters and an nn.Linear compute."""
    return linear(eager_affine(z, scale, scale_heads, offset, offset_heads), weight, bias)


def eager_affine(z, scale, scale_heads, offset, offset_heads) -> Tensor:
    D = (scale if scale is not None else offset).shape[1]
    x = z.unflatten(-1, (-1, D))
    if scale is not None:
        x = x * (1 + scale.new_zeros(x.shape[-2:]).index_copy(0, scale_heads, scale))
    if offset is not None:
        x = x + offset.new_zeros(x.shape[-2:]).index_copy(0, offset_heads, offset)
    return x.flatten(-2).to(z.dtype)


def gradients(y: Tensor, inputs: dict, asked, grad: Tensor) -> dict[str, Tensor | None]:
    leaves = [inputs[name] for name in asked]
    return dict(zip(asked, torch.autograd.grad(y, leaves, grad, allow_unused=True), strict=True))


def eager_in_orders(run, inputs: dict, asked, grad: Tensor) -> dict[str, list[Tensor]]:
    """By name the gradients of run(**inputs), in autograd; those that sum over tokens in several orders of that sum.

    run: `eager` or `eager_affine`, or one of them under autocast. grad: of its result. The offset's gradient is a sum
    over tokens and over columns of N; it is computed with either of them first.
    """
    columns = [grad.shape[-1]] if "weight" in inputs else []
    found = {name: [] for name in asked}
    for turn, (t, *n) in enumerate(orders(grad.shape[:-1].numel(), *columns, device=grad.device)):
        given = {**inputs, "z": inputs["z"].flatten(0, -2)[t]}
        dy = grad.flatten(0, -2)[t]
        if n:
            dy = dy[:, n[0]]
            given |= {name: inputs[name][n[0]] for name in ("weight", "bias") if inputs[name] is not None}
        # through the indexing, back to the order of the inputs
        for name, gradient in gradients(run(**given), inputs, asked, dy).items():
            if turn == 0 or name in ("bias", "scale", "offset"):
                found[name].append(gradient)
        if n and "offset" in asked:
            offset, weight = inputs["offset"].detach(), given["weight"].detach().to(dy.dtype)
            summed = (dy.to(offset.dtype).sum(0) @ weight.to(offset.dtype)).view(-1, offset.shape[1])
            found["offset"].append(summed[inputs["offset_heads"]])
    return found


def small(case: str) -> dict:
    """Inputs small enough for finite differences."""
    torch.manual_seed(3)
    inputs = make(case, torch.float64, D=2, rows=(3,))
    return {k: v[:5] if k in ("weight", "bias") else v for k, v in inputs.items()}
