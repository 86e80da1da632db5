"""Experimental until a GPU has timed it: the backward GEMM, dY W, with dz, da and dv taken from its accumulator."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lofit_kernels.gpu.launch import (
    any_listed,
    common_unit,
    count_heads,
    head_gradients,
    head_row,
    launch,
    listed_head,
    round_to,
)
from lofit_kernels.gpu.matmul import (
    column_slices,
    describe,
    dot,
    load_tile,
    matmul_tile,
    operand,
    programs_for,
    sum_both,
    tile_position,
)
from lofit_kernels.gpu.tiles import Tile


@triton.jit
def _columns_of(
    block,
    K,
    D,
    scale_heads,
    offset_heads,
    n_scale,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    EVERY_HEAD: tl.constexpr,
):
    """The columns [first, end) of column tile `block`: of all columns, or of a listed head (none if it came before)."""
    if EVERY_HEAD:
        first = block * BLOCK_K
        end = K
    else:
        per_head = tl.cdiv(D, BLOCK_K)
        slot = block // per_head
        head = listed_head(scale_heads, offset_heads, n_scale, slot)
        first = head * D + (block % per_head) * BLOCK_K
        end = head * D + D
        # a head in both lists is computed once, from its slot among the scales
        if (scale_heads is not None) and (offset_heads is not None):
            again = (slot >= n_scale) & (head_row(scale_heads, n_scale, head, BLOCK_HEADS) >= 0)
            end = tl.where(again, first, end)
    return first, end


@triton.jit
def _rows_of(heads, n_heads, column, columns, D, BLOCK_HEADS: tl.constexpr, SPAN: tl.constexpr):
    """For `columns`, which begin at `column` and touch at most SPAN heads: the i with heads[i] = their head, or -1;
    what to add to a column to find its element in row i of a (heads, D) tensor; and whether any head is listed."""
    head = column // D
    row = head_row(heads, n_heads, head, BLOCK_HEADS)
    rows = tl.full(columns.shape, 0, tl.int32) + row
    shift = tl.full(columns.shape, 0, tl.int32) + (row - head) * D
    listed = row
    for step in tl.static_range(1, SPAN):
        row = head_row(heads, n_heads, head + step, BLOCK_HEADS)
        # comparing with multiples of 8 keeps 16-byte accesses whole, dividing each column would not
        beyond = columns >= (head + step) * D
        rows = tl.where(beyond, row, rows)
        shift = tl.where(beyond, (row - head - step) * D, shift)
        listed = tl.maximum(listed, row)
    return rows, shift, listed >= 0


@triton.jit
def _reduce_slice(
    g,
    z,
    scale,
    scale_heads,
    offset_heads,
    dz,
    sum_gz,
    sum_g,
    row_start,
    column,
    end,
    T,
    D,
    n_scale,
    n_offset,
    stride_z,
    stride_dz,
    BLOCK_HEADS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """dz = (1 + a) G; sum_gz = sum_t G z; sum_g = sum_t G, on the columns below `end` and their listed heads"""
    columns = column + tl.arange(0, g.shape[1])
    inside = columns < end
    local = tl.arange(0, g.shape[0])[:, None]
    rows_inside = local < T - row_start
    row, shift, any_listed = _rows_of(scale_heads, n_scale, column, columns, D, BLOCK_HEADS, SPAN)
    scaled = inside & (row >= 0)
    gain_at = shift + columns
    if offset_heads is not None:
        row, shift, any_offset = _rows_of(offset_heads, n_offset, column, columns, D, BLOCK_HEADS, SPAN)
        any_listed = any_listed | any_offset
    if any_listed:
        gz = g
        if z is not None:
            addresses = z + tl.cast(row_start, tl.int64) * stride_z + (local * stride_z + columns[None, :])
            gz = g * tl.load(addresses, mask=rows_inside & scaled[None, :], other=0.0).to(tl.float32)
        if z is not None and offset_heads is not None:
            total_gz, total_g = sum_both(gz, g)
            tl.store(sum_gz + gain_at, total_gz, mask=scaled)
            tl.store(sum_g + shift + columns, total_g, mask=inside & (row >= 0))
        elif z is not None:
            tl.store(sum_gz + gain_at, tl.sum(gz, 0), mask=scaled)
        elif offset_heads is not None:
            tl.store(sum_g + shift + columns, tl.sum(g, 0), mask=inside & (row >= 0))
    if dz is not None:
        if scale is not None:
            g = g * (1.0 + tl.load(scale + gain_at, mask=scaled, other=0.0))[None, :]
        addresses = dz + tl.cast(row_start, tl.int64) * stride_dz + (local * stride_dz + columns[None, :])
        tl.store(addresses, round_to(g, dz.dtype.element_ty), mask=rows_inside & inside[None, :])


@triton.jit(do_not_specialize=["T", "N", "K", "D", "across", "n_scale", "n_offset", "stride_g", "stride_w", "stride_z"])
def _affine_linear_bwd_kernel(
    grad,
    weight,
    z,
    scale,
    scale_heads,
    offset_heads,
    dz,
    partials,
    T,
    N,
    K,
    D,
    across,
    n_scale,
    n_offset,
    stride_g,
    stride_w,
    stride_z,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    SPAN: tl.constexpr,
    EVERY_HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """G = dY W; dz = (1 + a) G; partials[c] = [sum_t G z | sum_t G] over the rows t of row block c, on listed heads"""
    WIDTH: tl.constexpr = BLOCK_K // SLICES
    n_n, n_d = N * UNIT, D * UNIT
    down = tl.cdiv(T, BLOCK_T)
    n_da = 0 if z is None else n_scale
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=DESCRIPTORS and EVERY_HEAD):
        block_t, block_k = tile_position(tile, down, across)
        t = block_t * BLOCK_T
        k, end = _columns_of(
            block_k, K * UNIT, n_d, scale_heads, offset_heads, n_scale, BLOCK_K, BLOCK_HEADS, EVERY_HEAD
        )
        acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for n in range(0, n_n if EVERY_HEAD else tl.where(k < end, n_n, 0), BLOCK_N):
            y = load_tile(grad, t, n, T, n_n, stride_g * UNIT, BLOCK_T, BLOCK_N, DESCRIPTORS)
            w = load_tile(weight, n, k, n_n, end, stride_w * UNIT, BLOCK_N, BLOCK_K, DESCRIPTORS)
            acc = dot(y, w, acc)
        sum_gz = partials
        sum_g = partials
        if partials is not None:
            sum_gz += tl.cast(block_t, tl.int64) * ((n_da + n_offset) * n_d)
            sum_g = sum_gz + n_da * n_d
        parts = column_slices(acc, SLICES)
        for part in tl.static_range(SLICES):
            _reduce_slice(
                parts[part],
                z,
                scale,
                scale_heads,
                offset_heads,
                dz,
                sum_gz,
                sum_g,
                t,
                k + part * WIDTH,
                end,
                T,
                n_d,
                n_scale,
                n_offset,
                stride_z * UNIT,
                K * UNIT,
                BLOCK_HEADS,
                SPAN,
            )


def _check(
    grad: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None,
    scale_heads: torch.Tensor | None,
    offset_heads: torch.Tensor | None,
    head_dim: int,
    needs: tuple[bool, bool, bool],
) -> None:
    (T, N), K = grad.shape, weight.shape[1]
    if weight.shape[0] != N:
        raise ValueError(f"grad has {N} columns and weight {weight.shape[0]} rows; expected as many")
    count_heads(weight, "weight", head_dim)
    if needs[1] and (scale_heads is None or z is None or z.shape != (T, K) or z.dtype != grad.dtype):
        raise ValueError(f"da needs scale_heads and a z of shape {(T, K)} and of {grad.dtype}")
    if needs[2] and offset_heads is None:
        raise ValueError("dv needs offset_heads")


def _span(width: int, head_dim: int) -> int:
    """How many heads a slice of `width` columns that begins at a multiple of `width` can touch."""
    if head_dim % width == 0 or width % head_dim == 0:
        return max(1, width // head_dim)
    return (width - 2) // head_dim + 2


def _sweep(
    grad: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_heads: torch.Tensor | None,
    offset_heads: torch.Tensor | None,
    dz: torch.Tensor | None,
    head_dim: int,
    tile: Tile | None,
    descriptors: bool | None,
) -> torch.Tensor | None:
    """Writes dz (when given) and returns the partial sums (row blocks, (n_da + n_dv) D), None when there are none.

    What is None is not computed.
    """
    (T, N), K = grad.shape, weight.shape[1]
    n_scale = 0 if scale_heads is None else scale_heads.shape[0]
    n_offset = 0 if offset_heads is None else offset_heads.shape[0]
    chosen, descriptors = matmul_tile("affine_linear_bwd", (grad, weight), T, tile, descriptors)
    BLOCK_T, BLOCK_K, BLOCK_N = (chosen[name] for name in ("BLOCK_T", "BLOCK_K", "BLOCK_N"))
    across = (n_scale + n_offset) * triton.cdiv(head_dim, BLOCK_K) if dz is None else triton.cdiv(K, BLOCK_K)
    down = triton.cdiv(T, BLOCK_T)
    width = ((0 if z is None else n_scale) + n_offset) * head_dim
    if down * across == 0:
        return None
    partials = torch.empty((down, width), dtype=torch.float32, device=grad.device) if width else None
    stride_z = 0 if z is None else z.stride(0)
    unit = common_unit(N, K, head_dim, grad.stride(0), weight.stride(0), stride_z)
    launch(
        _affine_linear_bwd_kernel,
        programs_for(down * across, grad, descriptors),
        describe(grad, (BLOCK_T, BLOCK_N)) if descriptors else grad,
        describe(weight, (BLOCK_N, BLOCK_K)) if descriptors else weight,
        z,
        scale,
        scale_heads,
        offset_heads,
        dz,
        partials,
        T,
        N // unit,
        K // unit,
        head_dim // unit,
        across,
        n_scale,
        n_offset,
        grad.stride(0) // unit,
        weight.stride(0) // unit,
        stride_z // unit,
        BLOCK_HEADS=triton.next_power_of_2(K // head_dim),
        SPAN=1 if dz is None else _span(BLOCK_K // chosen["SLICES"], head_dim),
        EVERY_HEAD=dz is not None,
        UNIT=unit,
        DESCRIPTORS=descriptors,
        **chosen.options(),
    )
    return partials


def affine_linear_bwd(
    grad: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_heads: torch.Tensor | None,
    offset_heads: torch.Tensor | None,
    head_dim: int,
    needs: tuple[bool, bool, bool] = (True, True, True),
    *,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """`G = dY W` with `dz = (1 + a) G`, `da = sum_t G z` and `dv = sum_t G` taken from its float32 accumulator.

    grad (T, N) is dY, weight (N, K), z (T, K), all of one dtype: float16, bfloat16 or float32; z for da only; scale
    (h_a, D) float32, for dz only; heads (h,) int64, distinct; needs says which of (dz, da, dv) to compute. Returns dz
    (T, K) of grad's dtype, da (h_a, D) and dv (h_v, D) float32, None where not needed.

    G itself is never stored, and da and dv see it before it is rounded. Sums run in a fixed order, without atomics.
    Without dz only the listed heads' columns of W are multiplied. One launch, two with da or dv.

    tile, descriptors: insist on a tile, and on loads through tensor descriptors (True) or pointers (False).
    Raises ValueError for an unsupported dtype or shape, for a gradient whose inputs are missing, and for descriptors of
    operands that cannot be described.
    """
    need_dz, need_da, need_dv = needs
    grad, weight = operand(grad, "grad"), operand(weight, "weight")
    _check(grad, weight, z, scale_heads, offset_heads, head_dim, needs)
    n_da = scale_heads.shape[0] if need_da else 0
    n_dv = offset_heads.shape[0] if need_dv else 0
    scaled = need_dz and any_listed(scale, scale_heads)
    dz = torch.empty((grad.shape[0], weight.shape[1]), dtype=grad.dtype, device=grad.device) if need_dz else None
    partials = _sweep(
        grad,
        weight,
        operand(z, "z") if n_da else None,
        scale.contiguous() if scaled else None,
        scale_heads if n_da or scaled else None,
        offset_heads if n_dv else None,
        dz,
        head_dim,
        tile,
        descriptors,
    )
    return dz, *head_gradients(partials, (n_da, n_dv), head_dim, (need_da, need_dv), grad)
