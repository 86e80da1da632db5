"""The primitives in plain ATen: CPU, and every device or dtype without Triton.

The names and signatures are those of `gpu.offset`, `gpu.offset_grouped` and `gpu.affine`: `projection.py` and `ops.py`
compose either. `heads` are always (h,) int64, ascending, on z's device. Sums and products run in float32 (float64 for
float64).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# bounds the float32 temporaries of the reductions: 16 MiB each
_ROWS_X_COLUMNS = 1 << 22
# mantissa bits of float32 that a dtype lacks
_LACKS = {torch.bfloat16: 16, torch.float16: 13}
# the magnitude from which a dtype's nearest number is infinity
_OVERFLOWS = {torch.bfloat16: 2.0**128 - 2.0**119, torch.float16: 65520.0}
# elements widened at a time on a CPU: 1 MiB of float32, which stays in its cache between writing and reading
_CACHED = 1 << 18


def offset_fold(weight: Tensor, offset: Tensor, heads: Tensor, bias: Tensor | None = None) -> Tensor:
    """b + W_S v_S over the selected heads.

    weight: (N, K); offset: (h, D); bias: (N,) or None. Returns (N,) in offset's dtype.
    """
    if weight.device.type == "cpu":
        folded = offset.new_zeros(weight.shape[0])
        for columns, rows in _runs(heads, offset.shape[1]):
            vector = offset[rows].reshape(-1)
            for block, part in _blocks(weight[:, columns], folded, offset.dtype):
                part.addmv_(block.to(offset.dtype), vector)
    else:
        folded = head_columns(weight, heads, offset.shape[1]).to(offset.dtype) @ offset.reshape(-1)
    return folded if bias is None else folded + bias


def column_sum(grad: Tensor) -> Tensor:
    """sum_t dY. grad: (T, N). Returns (N,), accumulated in float32 (float64 for float64)."""
    wide = _wide(grad)
    if grad.device.type != "cpu" or grad.dtype == wide:
        return grad.sum(0, dtype=wide)
    # a CPU widens all of it before it adds
    blocks = grad.split(max(1, _CACHED // max(1, grad.shape[1])))
    total = blocks[0].sum(0, dtype=wide)
    for block in blocks[1:]:
        total += block.sum(0, dtype=wide)
    return total


def offset_bwd(column_sum: Tensor, weight: Tensor, heads: Tensor, head_dim: int) -> Tensor:
    """dv = (sum_t dY) W_S. column_sum: (N,); weight: (N, K). Returns (h, D) in column_sum's dtype."""
    if weight.device.type != "cpu":
        return (column_sum @ head_columns(weight, heads, head_dim).to(column_sum.dtype)).view(-1, head_dim)
    dv = column_sum.new_zeros(heads.shape[0], head_dim)
    for columns, rows in _runs(heads, head_dim):
        flat = dv[rows].view(-1)
        for block, part in _blocks(weight[:, columns], column_sum, column_sum.dtype):
            flat.addmv_(block.to(column_sum.dtype).T, part)
    return dv


def grouped_fold(
    weights: Sequence[Tensor], offsets: Sequence[Tensor], heads: Sequence[Tensor], table: None = None
) -> list[Tensor]:
    """W_S v_S of many layers: (N,) each, in the offsets' dtype. weights: (N, K) each; offsets: (h, D) each.

    table: of addresses, which only Triton reads.
    """
    return [offset_fold(*layer) for layer in zip(weights, offsets, heads, strict=True)]


def grouped_bwd(
    column_sums: Sequence[Tensor],
    weights: Sequence[Tensor],
    heads: Sequence[Tensor],
    head_dim: int,
    table: None = None,
) -> list[Tensor]:
    """dv = (sum_t dY) W_S of many layers: (h, D) each, in the column sums' dtype. column_sums: (N,) each."""
    return [offset_bwd(*layer, head_dim) for layer in zip(column_sums, weights, heads, strict=True)]


def affine_fwd(
    z: Tensor,
    scale: Tensor | None,
    scale_heads: Tensor | None,
    offset: Tensor | None,
    offset_heads: Tensor | None,
    head_dim: int,
    dither: bool = False,
) -> Tensor:
    """(1 + a) z + v, rounded once. z: (T, K); scale, offset: (h, D) or None. Returns (T, K) in z's dtype.

    dither: round 16 bits as `dithered` does instead of to the nearest.
    """
    if scale is not None and offset is None and not dither and 2 * scale.numel() <= z.shape[1]:
        # the other heads are copied, and not widened
        x = z.clone(memory_format=torch.contiguous_format)
        gained = head_columns(z, scale_heads, head_dim) * (1 + scale.reshape(-1))
        heads = x.view(len(x), z.shape[1] // head_dim, head_dim)
        heads.index_copy_(1, scale_heads, gained.to(z.dtype).view(len(x), *scale.shape))
        return x
    gain = _dense(scale, scale_heads, z, head_dim, fill=1.0)
    shift = _dense(offset, offset_heads, z, head_dim, fill=0.0)
    if gain is None and shift is None:
        return z.clone()
    # the product of a 16-bit z and a float32 vector is float32: both steps round once, at the end
    value = z + shift if gain is None else z * gain if shift is None else torch.addcmul(shift, z.to(gain.dtype), gain)
    return dithered(value, z) if dither and z.dtype in _LACKS else value.to(z.dtype)


def dithered(value: Tensor, z: Tensor) -> Tensor:
    """value (T, K), float32, in z's 16-bit dtype, rounded up or down so that what is lost is right on the average.

    It goes up with the share of the gap to the next number that it has come, decided by a hash of z (T, K), which value
    was made of, and the column: no random numbers, and the same for a token wherever it stands in a batch. So neither
    1 + a nor v can be too small to act. What z's dtype can hold is left as it is, NaN and infinity too. Infinity comes
    only of what is infinity rounded to the nearest, and subnormal numbers of float16 are rounded to the nearest.
    """
    lacks = _LACKS[z.dtype]
    columns = torch.arange(value.shape[1], dtype=torch.int32, device=value.device)
    # any odd numbers with well-mixed bits; products wrap around
    mixed = (z.float().view(torch.int32) >> lacks) * -1640531535 + columns * -2048144777
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * -1028477379
    below = (1 << lacks) - 1
    raised = (value.contiguous().view(torch.int32) + ((mixed >> (32 - lacks)) & below)) & ~below
    largest = torch.finfo(z.dtype).max
    # false for NaN, which would be raised beyond its exponent
    finite = value.abs() < _OVERFLOWS[z.dtype]
    return torch.where(finite, raised.view(torch.float32).clamp(-largest, largest), value).to(z.dtype)


def affine_delta_fwd(z: Tensor, scale: Tensor, scale_heads: Tensor, head_dim: int) -> Tensor:
    """What rounding takes off (1 + a) z_S, on the selected heads only. z: (T, K); scale: (h, D).

    Returns (T, h * D) in z's dtype.
    """
    a = scale.reshape(-1)
    selected = head_columns(z, scale_heads, head_dim).to(a.dtype)
    rounded = (selected * (1 + a)).to(z.dtype)
    # 1 + a would lose what is left of a small one
    return (a * selected + (selected - rounded)).to(z.dtype)


def affine_bwd(
    grad: Tensor,
    z: Tensor | None,
    scale: Tensor | None,
    scale_heads: Tensor | None,
    offset_heads: Tensor | None,
    head_dim: int,
    needs: tuple[bool, bool, bool],
    inplace: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz = (1 + a) G;  da = sum_t G * z;  dv = sum_t G, each only where `needs` (dz, da, dv) asks.

    grad: (T, K), G; z: (T, K), needed for da only. inplace: grad is the caller's own temporary and may become dz.
    Returns dz (T, K) in grad's dtype, da and dv (h, D) in float32 (float64 for float64), or None.
    """
    needs_z, needs_scale, needs_offset = needs
    d_scale = _product_sum(grad, z, scale_heads, head_dim) if needs_scale else None
    d_offset = head_columns(grad, offset_heads, head_dim).sum(0, dtype=_wide(grad)) if needs_offset else None
    dz = None
    if needs_z:
        gain = _dense(scale, scale_heads, grad, head_dim, fill=1.0)
        if gain is None:
            dz = grad if inplace else grad.clone()
        else:
            dz = grad.mul_(gain) if inplace else (grad * gain).to(grad.dtype)
    return dz, d_scale, None if d_offset is None else d_offset.view(-1, head_dim)


def head_columns(x: Tensor, heads: Tensor, head_dim: int) -> Tensor:
    """The selected heads' columns of x (R, K), as (R, h * D): x itself when every head is selected."""
    n_heads = x.shape[1] // head_dim
    if heads.shape[0] == n_heads:
        return x
    return x.unflatten(1, (n_heads, head_dim)).index_select(1, heads).flatten(1)


def _runs(heads: Tensor, head_dim: int) -> Iterator[tuple[slice, slice]]:
    """Neighbouring heads together, as (their columns of W, their rows of v): views, where an index would copy."""
    listed = heads.tolist()
    first = 0
    for last, head in enumerate(listed):
        if last + 1 == len(listed) or listed[last + 1] != head + 1:
            yield slice(listed[first] * head_dim, (head + 1) * head_dim), slice(first, last + 1)
            first = last + 1


def _blocks(columns: Tensor, vector: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows of columns (N, c) and vector (N,), small enough to be widened to `dtype` in the cache."""
    rows = columns.shape[0] if columns.dtype == dtype else _CACHED // max(1, columns.shape[1])
    return zip(columns.split(max(1, rows)), vector.split(max(1, rows)), strict=True)


def _product_sum(grad: Tensor, z: Tensor, heads: Tensor, head_dim: int) -> Tensor:
    """sum_t G * z over the selected heads, in blocks of rows that bound the temporaries. Returns (h, D)."""
    wide = _wide(grad)
    total = torch.zeros(heads.shape[0] * head_dim, dtype=wide, device=grad.device)
    rows = max(1, _ROWS_X_COLUMNS // max(1, grad.shape[1]))
    for g, block in zip(grad.split(rows), z.split(rows), strict=True):
        total += (head_columns(g, heads, head_dim).to(wide) * head_columns(block, heads, head_dim)).sum(0)
    return total.view(-1, head_dim)


def _dense(vectors: Tensor | None, heads: Tensor | None, like: Tensor, head_dim: int, fill: float) -> Tensor | None:
    """fill + the rows (h, D) at their heads, as one vector (K,); None when there is nothing to place."""
    if vectors is None or vectors.shape[0] == 0:
        return None
    if vectors.shape[0] * head_dim == like.shape[1]:
        return fill + vectors.reshape(-1)
    dense = vectors.new_full((like.shape[1] // head_dim, head_dim), fill)
    return dense.index_add_(0, heads, vectors).view(-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
