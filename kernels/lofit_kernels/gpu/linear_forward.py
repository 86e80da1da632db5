"""Experimental until a GPU has timed it: the projection with the scale inside the GEMM.

The delta form is for a few heads, the prologue form for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lofit_kernels.gpu.launch import common_unit, count_heads, launch, round_to
from lofit_kernels.gpu.matmul import (
    column_slices,
    describe,
    dot,
    load_tile,
    matmul_tile,
    operand,
    programs_for,
    tile_position,
)
from lofit_kernels.gpu.tiles import Tile


@triton.jit
def _store_rows(
    acc,
    addend,
    y,
    row,
    column,
    T,
    N,
    stride_y,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
):
    """y[row + i, column + j] = acc[i, j] + addend[column + j], rounded once"""
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    rows = tl.arange(0, BLOCK_T)[:, None]
    first = y + tl.cast(row, tl.int64) * stride_y
    parts = column_slices(acc, SLICES)
    for part in tl.static_range(SLICES):
        columns = column + part * WIDTH + tl.arange(0, WIDTH)
        value = parts[part]
        if addend is not None:
            value += tl.load(addend + columns, mask=columns < N, other=0.0)[None, :]
        inside = (rows < T - row) & (columns < N)[None, :]
        tl.store(first + (rows * stride_y + columns[None, :]), round_to(value, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "N", "K", "D", "n_scale", "stride_z", "stride_weight"])
def _delta_linear_kernel(
    z,
    weight,
    addend,
    scale,
    scale_heads,
    y,
    T,
    N,
    K,
    D,
    n_scale,
    stride_z,
    stride_weight,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    UNIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """y = z W^T + round(a z_S) W_S^T + c, in one float32 accumulator, rounded once"""
    n_k, n_d = K * UNIT, D * UNIT
    across, steps = tl.cdiv(N * UNIT, BLOCK_N), tl.cdiv(n_d, BLOCK_K)
    down = tl.cdiv(T, BLOCK_T)
    d = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        block_t, block_n = tile_position(tile, down, across)
        t, n = block_t * BLOCK_T, block_n * BLOCK_N
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in range(0, n_k, BLOCK_K):
            x = load_tile(z, t, k, T, n_k, stride_z * UNIT, BLOCK_T, BLOCK_K, DESCRIPTORS)
            w = load_tile(weight, n, k, N * UNIT, n_k, stride_weight * UNIT, BLOCK_N, BLOCK_K, DESCRIPTORS)
            acc = dot(x, w.T, acc)
        for step in range(0, n_scale * steps):
            slot, start = step // steps, (step % steps) * BLOCK_K
            first = tl.load(scale_heads + slot).to(tl.int32) * n_d
            x = load_tile(z, t, first + start, T, first + n_d, stride_z * UNIT, BLOCK_T, BLOCK_K, DESCRIPTORS)
            w = load_tile(
                weight, n, first + start, N * UNIT, first + n_d, stride_weight * UNIT, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            inside = start + d < n_d
            a = tl.load(scale + slot * n_d + start + d, mask=inside, other=0.0)
            # columns of the next head may have been read: 0 times their NaN would be NaN
            delta = tl.where(inside[None, :], x.to(tl.float32) * a[None, :], 0.0)
            acc = dot(round_to(delta, x.dtype), w.T, acc)
        _store_rows(acc, addend, y, t, n, T, N * UNIT, N * UNIT, BLOCK_T, BLOCK_N, SLICES)


@triton.jit(do_not_specialize=["T", "N", "K", "stride_z", "stride_weight"])
def _prologue_linear_kernel(
    z,
    weight,
    addend,
    gain,
    y,
    T,
    N,
    K,
    stride_z,
    stride_weight,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    UNIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """y = round((1 + a) z) W^T + c, with gain = 1 + a over all columns of z, up to a multiple of BLOCK_K"""
    n_k = K * UNIT
    down, across = tl.cdiv(T, BLOCK_T), tl.cdiv(N * UNIT, BLOCK_N)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=DESCRIPTORS):
        block_t, block_n = tile_position(tile, down, across)
        t, n = block_t * BLOCK_T, block_n * BLOCK_N
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in range(0, n_k, BLOCK_K):
            x = load_tile(z, t, k, T, n_k, stride_z * UNIT, BLOCK_T, BLOCK_K, DESCRIPTORS)
            w = load_tile(weight, n, k, N * UNIT, n_k, stride_weight * UNIT, BLOCK_N, BLOCK_K, DESCRIPTORS)
            scaled = x.to(tl.float32) * tl.load(gain + k + tl.arange(0, BLOCK_K))[None, :]
            acc = dot(round_to(scaled, x.dtype), w.T, acc)
        _store_rows(acc, addend, y, t, n, T, N * UNIT, N * UNIT, BLOCK_T, BLOCK_N, SLICES)


def _check(
    z: torch.Tensor,
    weight: torch.Tensor,
    addend: torch.Tensor | None,
    scale: torch.Tensor,
    scale_heads: torch.Tensor,
    head_dim: int,
) -> None:
    if z.shape[1] != weight.shape[1]:
        raise ValueError(f"z has {z.shape[1]} columns and weight {weight.shape[1]}; expected as many")
    count_heads(z, "z", head_dim)
    if scale.shape != (scale_heads.shape[0], head_dim):
        expected = (scale_heads.shape[0], head_dim)
        raise ValueError(f"scale must have shape {expected}, got {tuple(scale.shape)}")
    if addend is not None and (addend.shape != weight.shape[:1] or addend.dtype != torch.float32):
        raise ValueError(
            f"the bias must be float32 of shape {tuple(weight.shape[:1])}, got {addend.dtype} of {tuple(addend.shape)}"
        )


def _operands(
    z: torch.Tensor, weight: torch.Tensor, chosen: Tile, descriptors: bool
) -> tuple[tuple[object, object], torch.Tensor]:
    """z and weight as the kernel takes them, and the result to be filled."""
    y = torch.empty((z.shape[0], weight.shape[0]), dtype=z.dtype, device=z.device)
    if not descriptors:
        return (z, weight), y
    BLOCK_T, BLOCK_N, BLOCK_K = (chosen[name] for name in ("BLOCK_T", "BLOCK_N", "BLOCK_K"))
    return (describe(z, (BLOCK_T, BLOCK_K)), describe(weight, (BLOCK_N, BLOCK_K))), y


def delta_linear(
    z: torch.Tensor,
    weight: torch.Tensor,
    addend_bias: torch.Tensor | None,
    scale: torch.Tensor,
    scale_heads: torch.Tensor,
    head_dim: int,
    *,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> torch.Tensor:
    """`z W^T + (a z_S) W_S^T + c` in one float32 accumulator: small scales are not lost, whatever the dtype of z.

    z (T, K) and weight (N, K) of one dtype: float16, bfloat16 or float32; addend_bias (N,) float32 or None, added
    before the one rounding; scale (h, D) float32; scale_heads (h,) int64, distinct. Returns y (T, N), new and
    contiguous, of z's dtype. One launch; the selected heads cost h / H of a second GEMM.

    tile, descriptors: insist on a tile, and on loads through tensor descriptors (True) or pointers (False).
    Raises ValueError for an unsupported dtype or shape, and for descriptors of operands that cannot be described.
    """
    z, weight = operand(z, "z"), operand(weight, "weight")
    _check(z, weight, addend_bias, scale, scale_heads, head_dim)
    (T, K), N = z.shape, weight.shape[0]
    chosen, descriptors = matmul_tile("delta_linear", (z, weight), T, tile, descriptors)
    operands, y = _operands(z, weight, chosen, descriptors)
    if y.numel() == 0:
        return y
    unit = common_unit(N, K, head_dim, z.stride(0), weight.stride(0))
    n_tiles = triton.cdiv(T, chosen["BLOCK_T"]) * triton.cdiv(N, chosen["BLOCK_N"])
    launch(
        _delta_linear_kernel,
        programs_for(n_tiles, z, descriptors),
        *operands,
        None if addend_bias is None else addend_bias.contiguous(),
        scale.contiguous(),
        scale_heads,
        y,
        T,
        N // unit,
        K // unit,
        head_dim // unit,
        scale_heads.shape[0],
        z.stride(0) // unit,
        weight.stride(0) // unit,
        UNIT=unit,
        DESCRIPTORS=descriptors,
        **chosen.options(),
    )
    return y


def prologue_linear(
    z: torch.Tensor,
    weight: torch.Tensor,
    addend_bias: torch.Tensor | None,
    scale: torch.Tensor,
    scale_heads: torch.Tensor,
    head_dim: int,
    *,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> torch.Tensor:
    """`round((1 + a) z) W^T + c`: the scale applied to z on its way into the matrix units, on any number of heads.

    Arguments, result and errors as in `delta_linear`. In 16-bit dtypes scales below half a unit of roundoff are lost,
    as in the elementwise pass. One launch, and two small ones that spread the scales over all columns.
    """
    z, weight = operand(z, "z"), operand(weight, "weight")
    _check(z, weight, addend_bias, scale, scale_heads, head_dim)
    (T, K), N = z.shape, weight.shape[0]
    chosen, descriptors = matmul_tile("prologue_linear", (z, weight), T, tile, descriptors)
    operands, y = _operands(z, weight, chosen, descriptors)
    if y.numel() == 0:
        return y
    padded = triton.cdiv(K, chosen["BLOCK_K"]) * chosen["BLOCK_K"]
    gain = torch.ones(padded, device=z.device, dtype=torch.float32)
    gain[:K].view(-1, head_dim).index_add_(0, scale_heads, scale)
    unit = common_unit(N, K, z.stride(0), weight.stride(0))
    n_tiles = triton.cdiv(T, chosen["BLOCK_T"]) * triton.cdiv(N, chosen["BLOCK_N"])
    launch(
        _prologue_linear_kernel,
        programs_for(n_tiles, z, descriptors),
        *operands,
        None if addend_bias is None else addend_bias.contiguous(),
        gain,
        y,
        T,
        N // unit,
        K // unit,
        z.stride(0) // unit,
        weight.stride(0) // unit,
        UNIT=unit,
        DESCRIPTORS=descriptors,
        **chosen.options(),
    )
    return y
