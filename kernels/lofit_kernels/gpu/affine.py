"""The elementwise pass x = (1 + a) z + v, its delta form, and its backward: dz, da and dv in one sweep."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lofit_kernels.gpu.launch import (
    accumulator,
    any_listed,
    cdiv,
    common_unit,
    count_heads,
    head_gradients,
    head_options,
    head_plan,
    head_row,
    launch,
    listed_head,
    planned,
    power_of_two,
    round_to,
    split_rows,
    unit_columns,
)


@triton.jit
def dither_to(value, z, columns, dtype: tl.constexpr):
    """value, float32, rounded to `dtype`: up with the share of the gap that it has come, by a hash of (z, column)

    See `lofit_kernels.aten.dithered`, the same bit for bit. z, of `dtype`, is what value was made of: a token's numbers
    depend on that token alone. What `dtype` can hold is left as it is. Infinity comes only of what is infinity rounded
    to the nearest, and subnormal numbers of float16 are rounded to the nearest.
    """
    # mantissa bits of float32 that dtype lacks
    LACKS: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    KEPT: tl.constexpr = -65536 if dtype == tl.bfloat16 else -8192
    LARGEST: tl.constexpr = 3.3895313892515355e38 if dtype == tl.bfloat16 else 65504.0
    # the magnitude from which the nearest number is infinity
    OVERFLOWS: tl.constexpr = 3.3961775292304957e38 if dtype == tl.bfloat16 else 65520.0
    mixed = (z.to(tl.float32).to(tl.int32, bitcast=True) >> LACKS) * -1640531535 + columns * -2048144777
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * -1028477379
    raised = value.to(tl.int32, bitcast=True) + ((mixed >> (32 - LACKS)) & ~KEPT)
    rounded = tl.clamp((raised & KEPT).to(tl.float32, bitcast=True), -LARGEST, LARGEST)
    # false for NaN, which would be raised beyond its exponent
    rounded = tl.where(tl.abs(value) < OVERFLOWS, rounded, value)
    return round_to(rounded, dtype)


@triton.jit(do_not_specialize=["T", "H", "n_scale", "n_offset", "stride_z"])
def _affine_fwd_kernel(
    z,
    scale,
    scale_heads,
    offset,
    offset_heads,
    x,
    T,
    H,
    n_scale,
    n_offset,
    stride_z,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DITHER: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """x[t, h D + d] = (1 + a[h, d]) z[t, h D + d] + v[h, d], with a = 0 and v = 0 on heads that are not listed"""
    head = tl.program_id(0) % H
    rows = (tl.program_id(0) // H) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    columns = head * D + d
    inside = (rows < T)[:, None] & (d < D)[None, :]
    wide = rows[:, None].to(tl.int64)
    narrow = tl.load(z + wide * (stride_z * UNIT) + columns[None, :], mask=inside, other=0.0)
    value = narrow.to(ACC)
    if scale is not None:
        row = head_row(scale_heads, n_scale, head, BLOCK_HEADS)
        a = tl.load(scale + row * D + d, mask=(d < D) & (row >= 0), other=0.0).to(ACC)
        value = value * (1.0 + a)[None, :]
    if offset is not None:
        row = head_row(offset_heads, n_offset, head, BLOCK_HEADS)
        v = tl.load(offset + row * D + d, mask=(d < D) & (row >= 0), other=0.0).to(ACC)
        # -0 + 0 is +0: heads without an offset are left alone, not added to
        value = tl.where(row >= 0, value + v[None, :], value)
    if DITHER:
        rounded = dither_to(value, narrow, columns[None, :], x.dtype.element_ty)
    else:
        rounded = round_to(value, x.dtype.element_ty)
    tl.store(x + wide * (H * D) + columns[None, :], rounded, mask=inside)


@triton.jit(do_not_specialize=["T", "n_scale", "stride_z"])
def _affine_delta_fwd_kernel(
    z,
    scale,
    scale_heads,
    r,
    T,
    n_scale,
    stride_z,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """r[t, s D + d] = a z + (z - round((1 + a) z)), with a = a[s, d] and z = z[t, heads[s] D + d]"""
    slot = tl.program_id(0) % n_scale
    rows = (tl.program_id(0) // n_scale) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < T)[:, None] & (d < D)[None, :]
    wide = rows[:, None].to(tl.int64)
    head = tl.load(scale_heads + slot).to(tl.int32)
    value = tl.load(z + wide * (stride_z * UNIT) + (head * D + d)[None, :], mask=inside, other=0.0)
    a = tl.load(scale + slot * D + d, mask=d < D, other=0.0).to(ACC)
    value = value.to(ACC)
    rounded = round_to(value * (1.0 + a)[None, :], r.dtype.element_ty)
    # 1 + a would lose what is left of a small one
    lost = value * a[None, :] + (value - rounded.to(ACC))
    tl.store(r + wide * (n_scale * D) + (slot * D + d)[None, :], round_to(lost, r.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "across", "n_scale", "n_offset", "stride_grad", "stride_z", "stride_dz", "blocks"])
def _affine_bwd_kernel(
    grad,
    z,
    scale,
    scale_heads,
    offset_heads,
    dz,
    partials,
    T,
    across,
    n_scale,
    n_offset,
    stride_grad,
    stride_z,
    stride_dz,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    EVERY_HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dz = (1 + a) G; partials[c] = [sum_t G z | sum_t G] over the rows t of chunk c, on the listed heads"""
    slot = tl.program_id(0) % across
    chunk = tl.program_id(0) // across
    head = slot if EVERY_HEAD else listed_head(scale_heads, offset_heads, n_scale, slot)
    scale_row = head_row(scale_heads, n_scale, head, BLOCK_HEADS)
    # a head in both lists is swept once, from its slot among the scales
    if (not EVERY_HEAD) and (slot >= n_scale) and (scale_row >= 0):
        return
    d = tl.arange(0, BLOCK_D)
    scaled = (d < D) & (scale_row >= 0)
    columns = (head * D + d)[None, :]
    gain = tl.full((BLOCK_D,), 1.0, ACC)
    if scale is not None:
        gain += tl.load(scale + scale_row * D + d, mask=scaled, other=0.0).to(ACC)
    sum_gz = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    sum_g = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    for block in range(chunk * blocks, (chunk + 1) * blocks):
        rows = (block * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
        wide = rows.to(tl.int64)
        inside = (rows < T) & (d < D)[None, :]
        on_scale = (rows < T) & scaled[None, :]
        g = tl.load(grad + wide * (stride_grad * UNIT) + columns, mask=inside, other=0.0).to(ACC)
        sum_g += g
        if z is not None:
            sum_gz += g * tl.load(z + wide * (stride_z * UNIT) + columns, mask=on_scale, other=0.0).to(ACC)
        if dz is not None:
            out = round_to(g * gain[None, :], dz.dtype.element_ty)
            tl.store(dz + wide * (stride_dz * UNIT) + columns, out, mask=inside if EVERY_HEAD else on_scale)
    n_da = 0 if z is None else n_scale
    here = chunk.to(tl.int64) * ((n_da + n_offset) * D) + d
    if z is not None:
        tl.store(partials + here + scale_row * D, tl.sum(sum_gz, 0), mask=scaled)
    if offset_heads is not None:
        # looked up only now: one register less is held through the loop
        row = head_row(offset_heads, n_offset, head, BLOCK_HEADS)
        tl.store(partials + here + (n_da + row) * D, tl.sum(sum_g, 0), mask=(d < D) & (row >= 0))


def affine_fwd(
    z: torch.Tensor,
    scale: torch.Tensor | None,
    scale_heads: torch.Tensor | None,
    offset: torch.Tensor | None,
    offset_heads: torch.Tensor | None,
    head_dim: int,
    dither: bool = False,
) -> torch.Tensor:
    """`(1 + a) z + v`, computed in float32 and rounded once; heads that are in neither list are copied bit for bit.

    z (T, K); scale (h_a, D) and offset (h_v, D) float32 or None; heads (h,) int64 on the same device, distinct. dither:
    round 16 bits up or down by a fixed pattern instead of to the nearest. Returns a new contiguous (T, K) of z's dtype.
    One launch. Raises ValueError for an unsupported dtype or shape.
    """
    z = unit_columns(z, "z")
    accumulator(z, "z")
    H, T = count_heads(z, "z", head_dim), z.shape[0]
    n_scale = scale_heads.shape[0] if scale is not None and scale_heads is not None else 0
    n_offset = offset_heads.shape[0] if offset is not None and offset_heads is not None else 0
    if not n_scale and not n_offset:
        return z.clone(memory_format=torch.contiguous_format)
    x = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if x.numel() == 0:
        return x
    programs, stride_z, options = _fwd_plan(z, T, H, head_dim, z.stride(0), z.dtype)
    launch(
        _affine_fwd_kernel,
        programs,
        z,
        scale.contiguous() if n_scale else None,
        scale_heads if n_scale else None,
        offset.contiguous() if n_offset else None,
        offset_heads if n_offset else None,
        x,
        T,
        H,
        n_scale,
        n_offset,
        stride_z,
        DITHER=dither and z.element_size() == 2,
        **options,
    )
    return x


@planned
def _fwd_plan(arch: str, T: int, H: int, head_dim: int, stride: int, dtype: torch.dtype) -> tuple:
    """(programs, row stride in its unit, keyword arguments) of `affine_fwd`."""
    unit = common_unit(stride)
    options = {"BLOCK_HEADS": power_of_two(H), **head_options("affine_fwd", arch, head_dim, unit, dtype)}
    return cdiv(T, options["BLOCK_T"]) * H, stride // unit, options


def affine_delta_fwd(z: torch.Tensor, scale: torch.Tensor, scale_heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """What rounding takes off `(1 + a) z_S`, on the selected heads only; in float32 next to nothing.

    z (T, K); scale (h, D) float32; scale_heads (h,) int64, distinct. Returns a new contiguous (T, h D) of z's dtype, in
    the order of scale_heads. One launch. Raises ValueError for an unsupported dtype or shape.
    """
    z = unit_columns(z, "z")
    accumulator(z, "z")
    count_heads(z, "z", head_dim)
    T, n_scale = z.shape[0], scale_heads.shape[0]
    r = torch.empty((T, n_scale * head_dim), dtype=z.dtype, device=z.device)
    if r.numel() == 0:
        return r
    unit = common_unit(z.stride(0))
    options = head_plan("affine_delta_fwd", z, head_dim, unit)
    launch(
        _affine_delta_fwd_kernel,
        cdiv(T, options["BLOCK_T"]) * n_scale,
        z,
        scale.contiguous(),
        scale_heads,
        r,
        T,
        n_scale,
        z.stride(0) // unit,
        **options,
    )
    return r


def _sweep(
    grad: torch.Tensor,
    z: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_heads: torch.Tensor | None,
    offset_heads: torch.Tensor | None,
    dz: torch.Tensor | None,
    head_dim: int,
    n_da: int,
    n_dv: int,
) -> torch.Tensor | None:
    """Writes dz (when given) and returns the partial sums (chunks, (n_da + n_dv) D), None when there is nothing to sum.

    What is None is not computed; a dz that is not grad itself is written on every head.
    """
    T, K = grad.shape
    _, acc_torch = accumulator(grad, "grad")
    every_head = dz is not None and dz is not grad
    n_scale = 0 if scale_heads is None else scale_heads.shape[0]
    across = K // head_dim if every_head else n_scale + n_dv
    if T == 0 or across == 0:
        return None
    strides = grad.stride(0), 0 if z is None else z.stride(0), 0 if dz is None else dz.stride(0)
    chunks, programs, numbers, options = _bwd_plan(grad, T, across, K // head_dim, head_dim, strides, grad.dtype)
    partials = None
    if n_da or n_dv:
        partials = torch.empty((chunks, (n_da + n_dv) * head_dim), dtype=acc_torch, device=grad.device)
    launch(
        _affine_bwd_kernel,
        programs,
        grad,
        z,
        scale,
        scale_heads,
        offset_heads,
        dz,
        partials,
        T,
        across,
        n_scale,
        n_dv,
        *numbers,
        EVERY_HEAD=every_head,
        **options,
    )
    return partials


@planned
def _bwd_plan(arch: str, T: int, across: int, H: int, head_dim: int, strides: tuple, dtype: torch.dtype) -> tuple:
    """(row chunks, programs, row strides in their unit and blocks per program, keyword arguments) of `affine_bwd`."""
    unit = common_unit(*strides)
    options = {"BLOCK_HEADS": power_of_two(H), **head_options("affine_bwd", arch, head_dim, unit, dtype)}
    blocks, chunks = split_rows(T, options["BLOCK_T"], across)
    return chunks, across * chunks, (*(stride // unit for stride in strides), blocks), options


def affine_bwd(
    grad: torch.Tensor,
    z: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_heads: torch.Tensor | None,
    offset_heads: torch.Tensor | None,
    head_dim: int,
    needs: tuple[bool, bool, bool] = (True, True, True),
    inplace: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """`dz = (1 + a) G`, `da = sum_t G z` and `dv = sum_t G` in one sweep, sums in a fixed order without atomics.

    grad (T, K) is G; z (T, K), for da only; scale (h_a, D) float32, for dz only; heads (h,) int64, distinct; needs
    says which of (dz, da, dv) to compute. Returns dz (T, K) of grad's dtype, da (h_a, D) and dv (h_v, D) float32
    (float64 for a float64 grad), None where not needed.

    With `inplace` grad is the caller's own temporary: only the listed heads are read or written, and dz is grad itself
    (a copy of it if its rows overlap or its columns are not neighbours). Otherwise grad is left alone, dz is new, and
    every head is swept when dz is needed, only the listed ones when not. One launch, two with da or dv.
    Raises ValueError for an unsupported dtype or shape, and for a gradient whose inputs are missing.
    """
    need_dz, need_da, need_dv = needs
    count_heads(grad, "z", head_dim)
    if need_da and (z is None or scale_heads is None or z.shape != grad.shape):
        raise ValueError(f"da needs scale_heads and a z of shape {tuple(grad.shape)}")
    if need_dv and offset_heads is None:
        raise ValueError("dv needs offset_heads")
    if inplace and need_dz and (grad.stride(1) != 1 or grad.stride(0) < grad.shape[1]):
        grad = grad.clone(memory_format=torch.contiguous_format)
    grad = unit_columns(grad, "grad")
    every_head = need_dz and not inplace
    scaled = need_dz and any_listed(scale, scale_heads)
    dz = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if every_head else grad
    n_da = scale_heads.shape[0] if need_da else 0
    n_dv = offset_heads.shape[0] if need_dv else 0
    partials = _sweep(
        grad,
        unit_columns(z, "z") if n_da else None,
        scale.contiguous() if scaled else None,
        scale_heads if n_da or scaled else None,
        offset_heads if n_dv else None,
        dz if every_head or scaled else None,
        head_dim,
        n_da,
        n_dv,
    )
    da, dv = head_gradients(partials, (n_da, n_dv), head_dim, (need_da, need_dv), grad)
    return dz if need_dz else None, da, dv
