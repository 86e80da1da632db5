"""Offsets that differ from row to row of a batch: one gather of a row of W v per sequence, added to the projection.

y + m R[i]        y: (B, S, N)   R: (A, N)   i: (B,)   m: (B, S, 1), where offsets act
dy = dY           dR = the sums of m dY over the tokens of each row, added up by the row of R that they took
"""

from __future__ import annotations

import torch
from torch import Tensor

from lofit_kernels.eager_scopes import once


def add_row_offsets(
    y: Tensor, table: Tensor, index: Tensor, mask: Tensor | None = None, *, inplace: bool = False
) -> Tensor:
    """y with a row of a table added to the tokens of each of its rows: computed in the table's dtype, rounded once.

    Args:
        y: (B, ..., N), in any floating dtype.
        table: (A, N) float32, or float64 beside a float64 y: W v of each adapter, and zeros for the base.
        index: (B,) int64, the row of the table for each row of y; (1,) for the same one everywhere. Its values are
            trusted.
        mask: (B, ..., 1) bool, true where the offsets act; None for everywhere. A size of 1 stands for any.
        inplace: whether y is a temporary of the caller's, which may be written to where no graph is built.

    Returns:
        (B, ..., N) in y's dtype.

    Raises:
        TypeError, ValueError: tensors that do not fit, naming what was got and what was expected.
    """
    _check(y, table, index, mask)
    if torch.compiler.is_compiling():
        return (y + _gathered(y, table, index, mask)).to(y.dtype)
    if torch.is_grad_enabled() and (y.requires_grad or table.requires_grad):
        return RowOffsets.apply(y, table, index, mask)
    rows = _gathered(y, table, index, mask)
    # one launch: the sum is made in the wider dtype there, too
    return y.add_(rows) if inplace and not y.requires_grad else (y + rows).to(y.dtype)


class RowOffsets(torch.autograd.Function):
    """`add_row_offsets`, which saves the index and the mask alone."""

    @staticmethod
    def forward(ctx, y, table, index, mask):
        """(B, ..., N), as `add_row_offsets`."""
        ctx.save_for_backward(index, mask)
        ctx.rows, ctx.wide = table.shape[0], table.dtype
        return (y + _gathered(y, table, index, mask)).to(y.dtype)

    @staticmethod
    @once
    def backward(ctx, grad):
        """The gradients of y and of the table that are needed."""
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        index, mask = ctx.saved_tensors
        acting = grad if mask is None else grad * mask
        if len(index) == 1:
            sums = acting.reshape(1, -1, grad.shape[-1]).sum(1, dtype=ctx.wide)
        else:
            sums = acting.reshape(len(index), -1, grad.shape[-1]).sum(1, dtype=ctx.wide)
        total = sums.new_zeros(ctx.rows, grad.shape[-1]).index_add_(0, index, sums)
        return grad, total, None, None


def _gathered(y: Tensor, table: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
    rows = table.index_select(0, index).view(-1, *[1] * (y.dim() - 2), y.shape[-1])
    return rows if mask is None else mask * rows


def _check(y: Tensor, table: Tensor, index: Tensor, mask: Tensor | None) -> None:
    if not y.is_floating_point() or y.dim() < 2:
        raise ValueError(f"expected floating y (B, ..., N), got {y.dtype} of shape {tuple(y.shape)}")
    if table.dim() != 2 or table.shape[1] != y.shape[-1]:
        raise ValueError(f"expected a table (A, {y.shape[-1]}) beside y {tuple(y.shape)}, got {tuple(table.shape)}")
    if table.dtype != torch.promote_types(y.dtype, torch.float32):
        wide = torch.promote_types(y.dtype, torch.float32)
        raise TypeError(f"expected a table in {wide} beside {y.dtype} activations, got {table.dtype}")
    if index.dtype != torch.int64 or index.dim() != 1 or index.shape[0] not in (1, y.shape[0]):
        raise ValueError(f"expected an index (1,) or ({y.shape[0]},) int64, got {index.dtype} {tuple(index.shape)}")
    if not y.device == table.device == index.device:
        raise ValueError(f"expected one device, got y on {y.device}, {table.device} and {index.device}")
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != y.dim() or mask.shape[-1] != 1):
        raise ValueError(f"expected a mask of bools (B, ..., 1), got {mask.dtype} of shape {tuple(mask.shape)}")
    if mask is not None and any(m != own and m != 1 for m, own in zip(mask.shape[:-1], y.shape[:-1], strict=True)):
        expected = (*y.shape[:-1], 1)
        raise ValueError(f"expected a mask of shape {expected}, or 1 in its place, got {tuple(mask.shape)}")
