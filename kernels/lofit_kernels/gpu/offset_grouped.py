"""The offsets of many layers at once: one launch folds every W v, two find every dv.

Layers come as a table of addresses, so that their tensors stay where they are. A row of it per layer:

    address of W, row stride of W, address of v, address of heads, number of heads
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lofit_kernels.gpu.address_tables import TABLES
from lofit_kernels.gpu.launch import (
    accumulator,
    cdiv,
    common_unit,
    head_plan,
    launch,
    split_rows,
    sum_partials,
    unit_columns,
)

_COLUMNS = 5
_ALIGNMENT = 16
_ELEMENT = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _address(table, at, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """The address at `table[at]`, of numbers of type ELEMENT."""
    address = tl.load(table + at).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        # wide loads need to know what a number read from memory does not tell
        address = tl.multiple_of(address, 16)
    return address


@triton.jit(do_not_specialize=["N"])
def _grouped_fold_kernel(
    layers,
    out,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[l, n] = sum_s sum_d W_l[n, heads_l[s] D + d] v_l[s, d]"""
    across = tl.cdiv(N, BLOCK_N)
    layer = tl.program_id(0) // across
    entry = layers + layer * 5
    weight = _address(entry, 0, ELEMENT, ALIGNED)
    stride_weight = tl.load(entry + 1)
    offset = _address(entry, 2, ACC, ALIGNED)
    heads = _address(entry, 3, tl.int64, False)
    n_heads = tl.load(entry + 4).to(tl.int32)
    rows = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = rows < N
    weight_rows = weight + rows[:, None, None].to(tl.int64) * (stride_weight * UNIT)
    total = tl.zeros((BLOCK_N, BLOCK_S, BLOCK_D), ACC)
    for start in range(0, n_heads, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        head = tl.load(heads + s, mask=s < n_heads, other=0)
        taken = (s < n_heads)[:, None] & (d < D)[None, :]
        v = tl.load(offset + s[:, None] * D + d[None, :], mask=taken, other=0.0)
        columns = head[:, None] * D + d[None, :]
        w = tl.load(weight_rows + columns[None, :, :], mask=inside[:, None, None] & taken[None, :, :], other=0.0)
        total += w.to(ACC) * v[None, :, :]
    tl.store(out + layer.to(tl.int64) * N + rows, tl.sum(tl.sum(total, 2), 1), mask=inside)


@triton.jit(do_not_specialize=["N", "n_slots", "blocks"])
def _grouped_bwd_kernel(
    layers,
    slots,
    column_sums,
    partials,
    N,
    n_slots,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """partials[c, i, d] = sum over the rows n of chunk c of (sum_t dY_l[t, n]) W_l[n, heads_l[s] D + d]

    where slot i is the head heads_l[s] of layer l: slots[i] = (l, s).
    """
    slot = tl.program_id(0) % n_slots
    chunk = tl.program_id(0) // n_slots
    layer = tl.load(slots + slot * 2)
    entry = layers + layer * 5
    weight = _address(entry, 0, ELEMENT, ALIGNED)
    stride_weight = tl.load(entry + 1)
    head = tl.load(_address(entry, 3, tl.int64, False) + tl.load(slots + slot * 2 + 1))
    d = tl.arange(0, BLOCK_D)
    columns = head * D + d
    total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for block in range(chunk * blocks, (chunk + 1) * blocks):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        addresses = weight + rows[:, None].to(tl.int64) * (stride_weight * UNIT) + columns[None, :]
        w = tl.load(addresses, mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
        summed = tl.load(column_sums + layer * N + rows, mask=rows < N, other=0.0)
        total += w.to(ACC) * summed[:, None]
    tl.store(partials + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, 0), mask=d < D)


class LayerTable(NamedTuple):
    """The table of some layers, with the unit of its strides, whether every address is a multiple of 16 bytes, and the
    addresses of the weights."""

    numbers: torch.Tensor
    unit: int
    aligned: bool
    weights: list[int]


def layer_table(
    weights: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor | None], heads: Sequence[torch.Tensor]
) -> LayerTable:
    """The table of layers as `grouped_fold` takes them, all contiguous but the rows of the weights.

    It holds for as long as these tensors stay where they are. Raises RuntimeError as `AddressTables.table` does.
    """
    strides = [weight.stride(0) for weight in weights]
    unit = common_unit(*strides)
    numbers: list[int] = []
    addresses: list[int] = []
    bits = 0
    for weight, stride, offset, listed in zip(weights, strides, offsets, heads, strict=True):
        w, v = weight.data_ptr(), 0 if offset is None else offset.data_ptr()
        bits |= w | v
        addresses.append(w)
        numbers += (w, stride // unit, v, listed.data_ptr(), listed.shape[0])
    table = TABLES.table(tuple(numbers), _COLUMNS, weights[0].device)
    return LayerTable(table, unit, bits % _ALIGNMENT == 0, addresses)


def _slots(counts: tuple[int, ...]) -> list[int]:
    """(layer, its row) of every slot, one after the other."""
    return [number for layer, count in enumerate(counts) for row in range(count) for number in (layer, row)]


def _readable(weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The weights, copies of those whose neighbouring columns are no neighbours in memory; see `unit_columns`."""
    for weight in weights:
        strides = weight.stride()
        if len(strides) != 2 or strides[1] != 1 or strides[0] >= 2**31:
            return [unit_columns(weight, "weight") for weight in weights]
    return weights


def _dense(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same, contiguous: a table knows an address and no strides."""
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]


def grouped_fold(
    weights: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    heads: Sequence[torch.Tensor],
    table: LayerTable | None = None,
) -> list[torch.Tensor]:
    """`W_S v_S` of L layers of one N, D, dtype and device, reading the selected columns only.

    Of each layer: weights (N, K), any K; offsets (h, D) float32, float64 for float64 weights; heads (h,) int64,
    distinct, each below K / D. Returns L vectors (N,) of the offsets' dtype, rows of one tensor. A layer's numbers do
    not depend on the layers beside it. One launch. table: the `layer_table` of these very tensors, where it is known.
    Raises ValueError for an unsupported dtype, RuntimeError where a CUDA graph is captured before the layers have been
    folded once (`address_tables`).
    """
    if table is None:
        weights = _readable(weights)
    _, acc_torch = accumulator(weights[0], "weight")
    L, N, D = len(weights), weights[0].shape[0], offsets[0].shape[1]
    out = torch.empty((L, N), dtype=acc_torch, device=weights[0].device)
    if N == 0:
        return list(out.unbind())
    if table is None:
        # alive until the launch, which knows their addresses only
        offsets, heads = _dense(offsets), _dense(heads)
        table = layer_table(weights, offsets, heads)
    options = head_plan("grouped_fold", weights[0], D, table.unit)
    launch(
        _grouped_fold_kernel,
        L * cdiv(N, options["BLOCK_N"]),
        TABLES.used(table.numbers),
        out,
        N,
        ALIGNED=table.aligned,
        ELEMENT=_ELEMENT[weights[0].dtype],
        **options,
    )
    return list(out.unbind())


def grouped_bwd(
    column_sums: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    heads: Sequence[torch.Tensor],
    head_dim: int,
    table: LayerTable | None = None,
) -> list[torch.Tensor]:
    """The gradients of L layers' offsets: `dv = (sum_t dY) W_S` each, in a fixed order, without atomics.

    Of each layer: column_sums (N,) float32; weights (N, K) and heads (h,) int64 as for `grouped_fold`. Returns L
    tensors (h, head_dim) of float32, float64 for float64 weights, parts of one. One copy that brings the sums together,
    and two launches. table: the `layer_table` of these layers, whose offsets do not matter. Raises ValueError and
    RuntimeError as `grouped_fold` does.
    """
    # since the forward pass a weight's data may have been replaced
    if table is None or [weight.data_ptr() for weight in weights] != table.weights:
        table = None
        weights = _readable(weights)
    _, acc_torch = accumulator(weights[0], "weight")
    D, N, device = head_dim, weights[0].shape[0], weights[0].device
    counts = tuple([listed.shape[0] for listed in heads])
    n_slots = sum(counts)
    if n_slots == 0 or N == 0:
        return [torch.zeros((count, D), dtype=acc_torch, device=device) for count in counts]
    if table is None:
        heads = _dense(heads)
        table = layer_table(weights, [None] * len(weights), heads)
    options = head_plan("grouped_bwd", weights[0], D, table.unit)
    blocks, chunks = split_rows(N, options["BLOCK_N"], n_slots)
    partials = torch.empty((chunks, n_slots * D), dtype=acc_torch, device=device)
    launch(
        _grouped_bwd_kernel,
        n_slots * chunks,
        TABLES.used(table.numbers),
        TABLES.used(TABLES.table(counts, 2, device, lambda: _slots(counts))),
        torch.stack(list(column_sums)).to(acc_torch),
        partials,
        N,
        n_slots,
        blocks,
        ALIGNED=table.aligned,
        ELEMENT=_ELEMENT[weights[0].dtype],
        **options,
    )
    return list(sum_partials(partials, n_slots * D)[0].view(n_slots, D).split(counts))
