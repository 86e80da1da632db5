"""One projection, forward and backward: composed of a backend's primitives and the vendor's GEMMs, or of GEMMs with the
scale inside. `dispatch.py` chooses among these; nothing is chosen here.

    fold, pass   y = x W^T + (b + W v)            x = z, or (1 + a) z
    delta        y = x W^T + r_S W_S^T + (b + W v)    x = (1 + a) z, and r what rounding x to 16 bits has taken off
    dither       y = x W^T + b                    x = (1 + a) z + v, rounded up or down
    backward     G = dY W;  dz = (1 + a) G;  da = sum_t G * z;  dv = (sum_t dY) W_S, or sum_t G with the dither

But for the dither the offset is folded, so its gradient needs a column sum and a thin product, and no activation.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from lofit_kernels import aten
from lofit_kernels.dispatch import GEMMS, LOW_PRECISION
from lofit_kernels.op_arguments import Arguments

# form -> the primitive that is the whole product, scale and constants included
_FUSED_FORWARD = {"pass": "prologue_linear", "delta": "delta_linear"}


# backend -> its primitives, Triton's from their first use on: every call of an import costs as much as an allocation
_LOADED: dict[str, ModuleType] = {"aten": aten}


def primitives(backend: str) -> ModuleType:
    """The module of elementwise and reduction primitives of a backend: "aten" or "triton"."""
    if backend not in _LOADED:
        from lofit_kernels.gpu import primitives as triton

        _LOADED[backend] = triton
    return _LOADED[backend]


def affine_linear_fwd(arguments: Arguments) -> Tensor:
    """y (..., N) for z (..., K), by the path that the arguments name, every part of it."""
    z, weight, bias, scale, scale_heads, offset, offset_heads, folded, (form, backend, gemm) = arguments
    rows = z.reshape(-1, z.shape[-1])
    on = primitives(backend)
    inside = form == "dither" and folded is None
    if offset is not None and folded is None and not inside:
        folded = on.offset_fold(weight, offset, offset_heads)
    constants = [term for term in (bias, folded) if term is not None]
    fused, _ = GEMMS[gemm]
    if fused:
        product = getattr(on, _FUSED_FORWARD[form])
        y = product(rows, weight, _summed(constants, torch.float32), scale, scale_heads, scale.shape[1])
        return y.view(*z.shape[:-1], y.shape[-1])
    addend = None
    if form == "pass":
        rows = on.affine_fwd(rows, scale, scale_heads, None, None, scale.shape[1])
    elif form == "dither":
        vectors = (offset, offset_heads) if inside else (None, None)
        rows = on.affine_fwd(rows, scale, scale_heads, *vectors, arguments.head_dim, dither=True)
    elif form == "delta":
        rest = on.affine_delta_fwd(rows, scale, scale_heads, scale.shape[1])
        rows = on.affine_fwd(rows, scale, scale_heads, None, None, scale.shape[1])
        # a small term: what rounds it to 16 bits is far below what rounds y
        addend = linear(rest, aten.head_columns(weight, scale_heads, scale.shape[1]))
    # rounded to 16 bits together, a large term would swallow a small one
    if z.dtype in LOW_PRECISION and len(constants) + (addend is not None) > 1:
        rows, weight = _with_columns(rows, weight, constants)
        constants = []
    constant = _summed(constants, z.dtype)
    if addend is None:
        y = linear(rows, weight, constant)
    else:
        # accumulated where it is: as an argument beside its result it would be copied there first
        addend = addend if constant is None else addend.add_(constant)
        y = torch.addmm(addend, rows, weight.T, out=addend)
    return y.view(*z.shape[:-1], y.shape[-1])


def affine_linear_bwd(
    grad: Tensor, arguments: Arguments, needs: tuple[bool, bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of (z, weight, bias, scale, offset), each only where `needs` asks, by the path of the forward pass.

    grad: (..., N). arguments: those of the forward pass; z for the gradients of scale and weight only.
    Sums over tokens are float32 (float64 for float64); the others have their input's dtype.
    """
    needs_z, needs_weight, needs_bias, needs_scale, needs_offset = needs
    z, weight, _, scale, scale_heads, offset, offset_heads, _, (form, backend, gemm) = arguments
    dy = grad.reshape(-1, grad.shape[-1])
    on = primitives(backend)
    rows = None if z is None else z.reshape(-1, z.shape[-1])
    dz = d_weight = d_bias = d_scale = d_offset = None
    # where G is computed anyway, the sum over it is at hand
    from_g = needs_offset and form == "dither" and (needs_z or needs_scale)
    if needs_bias or (needs_offset and not from_g):
        total = on.column_sum(dy)
        d_bias = total if needs_bias else None
        if needs_offset and not from_g:
            d_offset = on.offset_bwd(total, weight, offset_heads, arguments.head_dim)
    if needs_z or needs_scale:
        wanted = (needs_z, needs_scale, from_g)
        vectors = (scale, scale_heads, offset_heads if from_g else None, arguments.head_dim, wanted)
        if GEMMS[gemm][1]:
            dz, d_scale, d_sum = on.affine_linear_bwd(dy, weight, rows, *vectors)
        elif scale is None and not from_g:
            dz, d_sum = dy @ weight, None
        else:
            # G is a temporary of this call, so that untouched heads cost nothing
            dz, d_scale, d_sum = on.affine_bwd(dy @ weight, rows, *vectors, inplace=True)
        if from_g:
            d_offset = d_sum
    if needs_weight:
        d_weight = dy.T @ on.affine_fwd(rows, scale, scale_heads, offset, offset_heads, arguments.head_dim)
    dz = dz.view(*grad.shape[:-1], weight.shape[1]) if needs_z else None
    return dz, d_weight, d_bias, d_scale, d_offset


def _summed(constants: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Their sum, rounded to `dtype` once; None of none."""
    if not constants:
        return None
    total = constants[0] if len(constants) == 1 else sum(constants[1:], constants[0])
    return total if total.dtype == dtype else total.to(dtype)


def _with_columns(rows: Tensor, weight: Tensor, constants: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[z 1 ...] and [W c ...]: the constants as columns of the GEMM, whose accumulator is wider than they are.

    A float32 constant takes two columns, its 16-bit value and what that leaves. Eight columns in all, so that rows stay
    16-byte aligned.
    """
    parts = []
    for constant in constants:
        high = constant.to(weight.dtype)
        parts += [high] if constant.dtype == weight.dtype else [high, (constant - high).to(weight.dtype)]
    ones, columns = rows.new_zeros(rows.shape[0], 8), weight.new_zeros(weight.shape[0], 8)
    ones[:, : len(parts)] = 1
    columns[:, : len(parts)] = torch.stack(parts, 1)
    return torch.cat((rows, ones), 1), torch.cat((weight, columns), 1)
