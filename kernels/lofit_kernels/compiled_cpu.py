"""The projection as torch.compile sees it on a CPU: plain operations, which Inductor fuses with their neighbours, where
`ops.affine_linear` would be a wall between them.

    y = x W^T + c    x = (1 + a) z, rounded once
    dz = (1 + a) G    da = sum_t G * z    dc = sum_t dY    G = dY W

The same roundings as `projection.py`: the vectors and both sums are float32 (float64 for float64).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lofit_kernels.aten import head_columns
from lofit_kernels.dispatch import KEEP_SMALL, LOW_PRECISION, has_answers
from lofit_kernels.op_arguments import Arguments


def is_traced(arguments: Arguments, asked: str) -> bool:
    """Whether `affine_linear` below computes such a case under torch.compile: on a CPU, where an op does no better.

    arguments: with the path that is the default for them. asked: the form that was asked for.
    The op stays for the delta form, for the dither, and for several constants beside 16-bit activations, which need one
    accumulator for all terms; for a weight that is trained; and for answers measured here, which depend on the number
    of tokens.
    """
    z, path = arguments.z, arguments.path
    if z.device.type != "cpu" or path.backend != "aten":
        return False
    shift = arguments.offset is not None or arguments.folded is not None
    constants = shift + (arguments.bias is not None)
    if arguments.weight.requires_grad or path.form in KEEP_SMALL or (constants > 1 and z.dtype in LOW_PRECISION):
        return False
    return arguments.scale is None or asked != "auto" or not has_answers(z.device)


def affine_linear(arguments: Arguments) -> Tensor:
    """y (..., N) of arguments whose offset, if there is one, is folded and whose weight is frozen."""
    constants = [constant for constant in (arguments.bias, arguments.folded) if constant is not None]
    constant = sum(constants[1:], constants[0]) if constants else None
    return _Projection.apply(arguments.z, arguments.weight, arguments.scale, arguments.scale_heads, constant)


class _Projection(torch.autograd.Function):
    """y = ((1 + a) * z) W^T + c. z: (..., K); weight: (N, K); scale: (h, D), heads: (h,) int64, or None; c: (N,)."""

    @staticmethod
    def forward(ctx, z, weight, scale, heads, constant):
        """y (..., N) in z's dtype."""
        # z is the only activation: a constant alone never needs it
        ctx.save_for_backward(z if ctx.needs_input_grad[2] else None, weight, scale, heads)
        x = z if scale is None else (z * _gain(scale, heads, weight)).to(z.dtype)
        return linear(x, weight, None if constant is None else constant.to(z.dtype))

    @staticmethod
    def backward(ctx, grad):
        """The gradients of z, scale and constant that are needed."""
        z, weight, scale, heads = ctx.saved_tensors
        needs_z, _, needs_scale, _, needs_constant = ctx.needs_input_grad
        rows, wide = grad.reshape(-1, grad.shape[-1]), torch.promote_types(grad.dtype, torch.float32)
        d_constant = rows.sum(0, dtype=wide) if needs_constant else None
        dz = d_scale = None
        if needs_z or needs_scale:
            dz = rows @ weight
        if needs_scale:
            g, of = (head_columns(x, heads, scale.shape[1]) for x in (dz, z.reshape(-1, z.shape[-1])))
            d_scale = (g.to(wide) * of).sum(0).view(scale.shape)
        if needs_z:
            dz = dz if scale is None else (dz * _gain(scale, heads, weight)).to(grad.dtype)
            dz = dz.view(*grad.shape[:-1], weight.shape[1])
        return dz if needs_z else None, None, d_scale, None, d_constant


def _gain(scale: Tensor, heads: Tensor, weight: Tensor) -> Tensor:
    """1 + a of every column, (K,)."""
    if scale.numel() == weight.shape[1]:
        return 1 + scale.reshape(-1)
    dense = scale.new_ones(weight.shape[1] // scale.shape[1], scale.shape[1])
    return dense.index_add(0, heads, scale).view(-1)
