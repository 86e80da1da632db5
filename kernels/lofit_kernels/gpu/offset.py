"""Offsets: folding W v into a bias, and the two sums that give the offset's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lofit_kernels.gpu import tiles
from lofit_kernels.gpu.launch import (
    ACCUMULATOR,
    accumulator,
    cdiv,
    common_unit,
    head_plan,
    launch,
    planned,
    split_rows,
    sum_partials,
    unit_columns,
)
from lofit_kernels.gpu.tiles import ONE_STAGE_ROWS


@triton.jit(do_not_specialize=["N", "n_heads", "stride_weight"])
def _offset_fold_kernel(
    weight,
    offset,
    heads,
    bias,
    out,
    N,
    n_heads,
    stride_weight,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[n] = bias[n] + sum_s sum_d W[n, heads[s] D + d] v[s, d]"""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = rows < N
    weight_rows = weight + rows[:, None, None].to(tl.int64) * (stride_weight * UNIT)
    total = tl.zeros((BLOCK_N, BLOCK_S, BLOCK_D), ACC)
    for start in range(0, n_heads, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        head = tl.load(heads + s, mask=s < n_heads, other=0)
        taken = (s < n_heads)[:, None] & (d < D)[None, :]
        v = tl.load(offset + s[:, None] * D + d[None, :], mask=taken, other=0.0).to(ACC)
        columns = head[:, None] * D + d[None, :]
        w = tl.load(weight_rows + columns[None, :, :], mask=inside[:, None, None] & taken[None, :, :], other=0.0)
        total += w.to(ACC) * v[None, :, :]
    folded = tl.sum(tl.sum(total, 2), 1)
    if bias is not None:
        folded += tl.load(bias + rows, mask=inside, other=0.0).to(ACC)
    tl.store(out + rows, folded, mask=inside)


@triton.jit(do_not_specialize=["T", "N", "stride_grad", "blocks"])
def _column_sum_kernel(
    grad,
    partials,
    T,
    N,
    stride_grad,
    blocks,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """partials[c, n] = sum of dY[t, n] over the rows t of chunk c"""
    n_columns = N * UNIT
    across = tl.cdiv(n_columns, BLOCK_N)
    chunk = tl.program_id(0) // across
    columns = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n_columns
    total = tl.zeros((BLOCK_T, BLOCK_N), ACC)
    for first in range(chunk * blocks, (chunk + 1) * blocks, AT_ONCE):
        # the loads of several blocks are in flight together
        for step in tl.static_range(AT_ONCE):
            rows = (first + step) * BLOCK_T + tl.arange(0, BLOCK_T)
            addresses = grad + rows[:, None].to(tl.int64) * (stride_grad * UNIT) + columns[None, :]
            total += tl.load(addresses, mask=(rows < T)[:, None] & inside[None, :], other=0.0).to(ACC)
    tl.store(partials + chunk.to(tl.int64) * n_columns + columns, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["N", "n_heads", "stride_weight", "blocks"])
def _offset_bwd_kernel(
    column_sum,
    weight,
    heads,
    partials,
    N,
    n_heads,
    stride_weight,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """partials[c, s, d] = sum over the rows n of chunk c of (sum_t dY[t, n]) W[n, heads[s] D + d]"""
    s = tl.program_id(0) % n_heads
    chunk = tl.program_id(0) // n_heads
    d = tl.arange(0, BLOCK_D)
    columns = tl.load(heads + s) * D + d
    total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for block in range(chunk * blocks, (chunk + 1) * blocks):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        addresses = weight + rows[:, None].to(tl.int64) * (stride_weight * UNIT) + columns[None, :]
        w = tl.load(addresses, mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
        summed = tl.load(column_sum + rows, mask=rows < N, other=0.0)
        total += w.to(ACC) * summed.to(ACC)[:, None]
    tl.store(partials + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, 0), mask=d < D)


def offset_fold(
    weight: torch.Tensor, offset: torch.Tensor, heads: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The bias that makes the offsets part of the projection: `bias + W_S v_S`, reading the selected columns of W only.

    weight (N, K); offset (h, D) float32; heads (h,) int64 on the same device, distinct, each below K / D; bias (N,) or
    None. Returns (N,) float32, float64 for a float64 weight. One launch. Raises ValueError for an unsupported dtype.
    """
    weight = unit_columns(weight, "weight")
    _, acc_torch = accumulator(weight, "weight")
    n_heads, D = offset.shape
    N = weight.shape[0]
    if n_heads == 0 or N == 0:
        return torch.zeros(N, dtype=acc_torch, device=weight.device) if bias is None else bias.to(acc_torch, copy=True)
    out = torch.empty(N, dtype=acc_torch, device=weight.device)
    unit = common_unit(weight.stride(0))
    options = head_plan("offset_fold", weight, D, unit)
    launch(
        _offset_fold_kernel,
        cdiv(N, options["BLOCK_N"]),
        weight,
        offset.contiguous(),
        heads,
        None if bias is None else bias.contiguous(),
        out,
        N,
        n_heads,
        weight.stride(0) // unit,
        **options,
    )
    return out


def column_sum(grad: torch.Tensor) -> torch.Tensor:
    """`sum_t dY[t]` in a fixed order, without atomics.

    grad (T, N). Returns (N,) float32, float64 for a float64 grad; zeros when T = 0. One launch for up to
    `tiles.ONE_STAGE_ROWS` rows, of programs that sum whole columns; else two.
    Raises ValueError for an unsupported dtype.
    """
    grad = unit_columns(grad, "grad")
    _, acc_torch = accumulator(grad, "grad")
    (T, N), device = grad.shape, grad.device
    if T == 0 or N == 0:
        return torch.zeros(N, dtype=acc_torch, device=device)
    chunks, programs, numbers, options = _column_sum_plan(grad, T, N, grad.stride(0), grad.dtype, T <= ONE_STAGE_ROWS)
    partials = torch.empty((chunks, N), dtype=acc_torch, device=device)
    launch(_column_sum_kernel, programs, grad, partials, *numbers, **options)
    return sum_partials(partials, N)[0]


@planned
def _column_sum_plan(arch: str, T: int, N: int, stride: int, dtype: torch.dtype, alone: bool) -> tuple:
    """(row chunks, programs, the kernel's numbers, its keyword arguments) of `column_sum`; alone: in one launch."""
    tile, unit = tiles.tile("column_sum", arch, 1 if alone else ONE_STAGE_ROWS + 1), common_unit(stride, N)
    across, rows = cdiv(N, tile["BLOCK_N"]), tile["BLOCK_T"] * tile["AT_ONCE"]
    steps, chunks = (cdiv(T, rows), 1) if alone else split_rows(T, rows, across)
    options = {"UNIT": unit, "ACC": ACCUMULATOR[dtype][0], **tile.options()}
    return chunks, across * chunks, (T, N // unit, stride // unit, steps * tile["AT_ONCE"]), options


def offset_bwd(column_sum: torch.Tensor, weight: torch.Tensor, heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The offset's gradient from the column sum of dY: `dv = (sum_t dY) W_S`, in a fixed order, without atomics.

    column_sum (N,) float32; weight (N, K); heads (h,) int64. Returns (h, head_dim) float32, float64 for a float64
    weight. Two launches. Raises ValueError for an unsupported dtype.
    """
    weight = unit_columns(weight, "weight")
    _, acc_torch = accumulator(weight, "weight")
    n_heads, D, N = heads.shape[0], head_dim, weight.shape[0]
    if n_heads == 0 or N == 0:
        return torch.zeros((n_heads, D), dtype=acc_torch, device=weight.device)
    unit = common_unit(weight.stride(0))
    options = head_plan("offset_bwd", weight, D, unit)
    blocks, chunks = split_rows(N, options["BLOCK_N"], n_heads)
    partials = torch.empty((chunks, n_heads * D), dtype=acc_torch, device=weight.device)
    launch(
        _offset_bwd_kernel,
        n_heads * chunks,
        column_sum.contiguous(),
        weight,
        heads,
        partials,
        N,
        n_heads,
        weight.stride(0) // unit,
        blocks,
        **options,
    )
    return sum_partials(partials, n_heads * D)[0].view(n_heads, D)
