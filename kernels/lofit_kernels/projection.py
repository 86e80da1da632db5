"""One projection, forward and backward, composed from a backend's primitives and the vendor's GEMMs.

    fold, pass   y = x W^T + c                    x = z, or (1 + a) z;  c = b + W v, in float32 until it meets y
    delta        y = z W^T + ((a z_S) W_S^T + W v)
    backward     G = dY W;  dz = (1 + a) G;  da = sum_t G * z;  dv = (sum_t dY) W_S

The offset is always folded, so its gradient needs a column sum and a thin product, and no activation.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from lofit_kernels import aten
from lofit_kernels.plan import LOW_PRECISION


def primitives(backend: str) -> ModuleType:
    """The module of elementwise and reduction primitives of a backend: "aten" or "triton"."""
    if backend == "aten":
        return aten
    from lofit_kernels.gpu import primitives as triton

    return triton


def affine_linear_fwd(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_heads: Tensor | None,
    offset: Tensor | None,
    offset_heads: Tensor | None,
    folded: Tensor | None,
    form: str,
    backend: str,
) -> Tensor:
    """y (..., N) for z (..., K); arguments as in `ops.affine_linear`."""
    on = primitives(backend)
    low = z.dtype in LOW_PRECISION
    rows = z.reshape(-1, z.shape[-1])
    # a 16-bit bias cannot take in a small W v: it goes into the GEMM as a column of its own instead
    separate_bias = bias is not None and low and (offset is not None or form == "delta")
    shift = None if separate_bias else bias
    if folded is not None:
        shift = folded if shift is None else folded + shift
    elif offset is not None:
        shift = on.offset_fold(weight, offset, offset_heads, shift)
    shift = None if shift is None else shift.to(z.dtype)
    if form == "pass":
        rows = on.affine_fwd(rows, scale, scale_heads, None, None, scale.shape[1])
    addend = shift
    if form == "delta":
        part = on.affine_delta_fwd(rows, scale, scale_heads, scale.shape[1])
        addend = linear(part, aten.head_columns(weight, scale_heads, scale.shape[1]), shift)
    if separate_bias:
        rows, weight = _with_bias_column(rows, weight, bias)
    y = linear(rows, weight) if addend is None else torch.addmm(addend, rows, weight.T)
    return y.view(*z.shape[:-1], y.shape[-1])


def affine_linear_bwd(
    grad: Tensor,
    z: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    scale_heads: Tensor | None,
    offset: Tensor | None,
    offset_heads: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of (z, weight, bias, scale, offset), each only where `needs` asks; grad: (..., N).

    z is needed for the gradients of scale and weight only.
    """
    on = primitives(backend)
    needs_z, needs_weight, needs_bias, needs_scale, needs_offset = needs
    dy = grad.reshape(-1, grad.shape[-1])
    rows = None if z is None else z.reshape(-1, z.shape[-1])
    dz = d_weight = d_bias = d_scale = d_offset = None
    if needs_bias or needs_offset:
        total = on.column_sum(dy)
        d_bias = total if needs_bias else None
        d_offset = on.offset_bwd(total, weight, offset_heads, offset.shape[1]) if needs_offset else None
    if needs_z or needs_scale:
        g = dy @ weight
        if scale is None:
            dz = g
        else:
            wanted = (needs_z, needs_scale, False)
            # g is a temporary of this call, so that untouched heads cost nothing
            dz, d_scale, _ = on.affine_bwd(g, rows, scale, scale_heads, None, scale.shape[1], wanted, inplace=True)
    if needs_weight:
        head_dim = 1 if scale is None and offset is None else (scale if scale is not None else offset).shape[1]
        d_weight = dy.T @ on.affine_fwd(rows, scale, scale_heads, offset, offset_heads, head_dim)
    dz = dz.view(*grad.shape[:-1], weight.shape[1]) if needs_z else None
    return dz, d_weight, d_bias, d_scale, d_offset


def _with_bias_column(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[z 1 0...] and [W b 0...]: eight columns more, so that rows stay 16-byte aligned."""
    ones = rows.new_zeros(rows.shape[0], 8)
    ones[:, 0] = 1
    column = weight.new_zeros(weight.shape[0], 8)
    column[:, 0] = bias
    return torch.cat((rows, ones), 1), torch.cat((weight, column), 1)
