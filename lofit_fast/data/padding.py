"""The one place that pads: lists of token ids to a rectangle, on the right for training, on the left for generation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]
# whether whoever calls a model has padded on the right, for attention that needs no mask of padding then
PADDED_RIGHT: ContextVar[bool] = ContextVar("lofit_padded_right", default=False)


def rectangle(rows: Sequence[Sequence[int]], fill: int, *, side: Side = "right", multiple_of: int = 1) -> Tensor:
    """The rows, filled up to one width: (B, S) int64.

    Args:
        rows: lists of integers, at least one, of any lengths.
        fill: what stands where a row has ended.
        side: where the filling goes.
        multiple_of: S is the longest row's length, rounded up to a multiple of this.
    """
    width = -(-max(map(len, rows)) // multiple_of) * multiple_of
    filled = [(list(row), [fill] * (width - len(row))) for row in rows]
    return torch.tensor([row + more if side == "right" else more + row for row, more in filled])


def padded(
    rows: Sequence[Sequence[int]], pad: int, *, side: Side = "right", multiple_of: int = 1
) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, S) int64: the rows filled with `pad`, and 1 where a token is, 0 where it is padding."""
    ids = rectangle(rows, pad, side=side, multiple_of=multiple_of)
    return ids, rectangle([[1] * len(row) for row in rows], 0, side=side, multiple_of=multiple_of)


@contextmanager
def padded_on_the_right() -> Iterator[None]:
    """A scope in which models are called with batches that are padded on the right, or not at all."""
    before = PADDED_RIGHT.set(True)
    try:
        yield
    finally:
        PADDED_RIGHT.reset(before)
