"""A batch in one row: its examples end to end, and the beginning that all of them share only once.

All of a model but its attention treats tokens one by one, and so never sees a padded or a repeated one. Attention
spreads the row over padded rows, which its products want, and lays their outputs end to end again.

A packed row has P shared tokens and then the others, example after example: N in all. Two index tensors say where they
go. `rows` (B, T): for each place of the padded rows the token there, -1 where there is none. `places` (N - P,): for
each token that is not shared its place, b T + t.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function


def spread(packed: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """(1, H, N, D) -> (B, H, T, D), the shared tokens in every row.

    Where there is no token stands another one's value, whose gradient is dropped: a mask must keep it out of results.
    """
    return _Spread.apply(packed, rows, places)


def gather(padded: Tensor, rows: Tensor, places: Tensor, tokens: int) -> Tensor:
    """(B, H, T, D) -> (1, N, H, D) for N tokens; the shared ones from the first row, as they are the same in each."""
    return _Gather.apply(padded, rows, places, tokens)


class _Spread(Function):
    @staticmethod
    def forward(ctx, packed: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shared = packed.shape[2] - len(places)
        return packed[0][:, rows.clamp(min=0)].transpose(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        shared = grad[:, :, : ctx.shared].sum(0)
        own = grad.transpose(0, 1).flatten(1, 2)[:, places]
        return torch.cat((shared, own), 1)[None], None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx, padded: Tensor, rows: Tensor, places: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shared = tokens - len(places)
        shared = padded[0, :, : ctx.shared].transpose(0, 1)
        own = padded.transpose(1, 2).flatten(0, 1)[places]
        return torch.cat((shared, own))[None]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        row, column = (torch.arange(size, device=rows.device) for size in rows.shape)
        read = (rows >= 0) & ((row[:, None] == 0) | (column >= ctx.shared))
        spread = grad[0][rows.clamp(min=0)] * read[:, :, None, None]
        return spread.transpose(1, 2), None, None, None
