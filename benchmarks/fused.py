"""The fused GEMM kernels as a differentiable projection, composed by hand so that they can be timed one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def fused_linear(
    z: Tensor,
    weight: Tensor,
    *,
    scale: Tensor,
    scale_heads: Tensor,
    offset: Tensor | None,
    offset_heads: Tensor | None,
    forward: str,
) -> Tensor:
    """y = ((1 + a) z + v) W^T, with dz, da and dv in one fused GEMM. z: (..., K); weight: (N, K), frozen.

    forward: "delta" or "prologue" for the fused GEMM of that name, "pass" for an elementwise pass and the vendor's.
    Needs Triton on a GPU, or its interpreter.
    """
    return _FusedLinear.apply(z, weight, scale, scale_heads, offset, offset_heads, forward)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight, scale, scale_heads, offset, offset_heads, kind):
        from lofit_kernels.gpu.affine import affine_fwd
        from lofit_kernels.gpu.forward import delta_linear, prologue_linear
        from lofit_kernels.gpu.offset import offset_fold

        rows, head_dim = z.reshape(-1, z.shape[-1]), scale.shape[1]
        folded = None if offset is None else offset_fold(weight, offset, offset_heads)
        if kind == "pass":
            x = affine_fwd(rows, scale, scale_heads, None, None, head_dim)
            y = linear(x, weight, None if folded is None else folded.to(x.dtype))
        else:
            launcher = {"delta": delta_linear, "prologue": prologue_linear}[kind]
            y = launcher(rows, weight, folded, scale, scale_heads, head_dim)
        ctx.save_for_backward(z, weight, scale, scale_heads, offset_heads)
        return y.view(*z.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from lofit_kernels.gpu.backward import affine_linear_bwd

        z, weight, scale, scale_heads, offset_heads = ctx.saved_tensors
        rows, dy = z.reshape(-1, z.shape[-1]), grad.reshape(-1, grad.shape[-1])
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[4])
        dz, da, dv = affine_linear_bwd(dy, weight, rows, scale, scale_heads, offset_heads, scale.shape[1], needs)
        return dz if dz is None else dz.view(z.shape), None, da, None, dv, None, None
