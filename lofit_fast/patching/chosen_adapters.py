"""Which adapter a forward has, or each row of its batch, and what a projection computes with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lofit_fast.patching.early_fold import EarlyFold
from lofit_fast.patching.frozen_linear import PRODUCTS
from lofit_fast.patching.offset_table import BASE, OffsetTable, Vectors
from lofit_kernels import head_affine_linear
from lofit_kernels.row_offsets import add_row_offsets

_GENERATION = "transformers.generation.utils"


class Chosen:
    """Adapters by the slots of their tables, for layers to read: tensors and plain numbers, which compilers guard.

    slots: of each row of a batch, or of all rows together where whole is set. trained: the slots whose vectors may
    move, folded anew in each forward. room: slots that tables must have.

    index: (B,) or (1,) int64, into a table as `OffsetTable.rows` lays it: all slots, or where there are fresh ones, the
    slots in kept and then those in fresh. base: whether it is the base for all rows.
    """

    def __init__(
        self, slots: Sequence[int], trained: set[int], room: int, whole: bool, device: torch.device | str
    ) -> None:
        used = sorted({BASE, *slots})
        self.slots, self.room, self.whole = frozenset(slots), room, whole
        self.base = whole and self.slots == {BASE}
        self.fresh = tuple(slot for slot in used if slot in trained)
        kept = [slot for slot in used if slot not in trained]
        place = {slot: number for number, slot in enumerate((*kept, *self.fresh))}
        places = [place[slot] for slot in slots] if self.fresh else list(slots)
        # a choice may outlive the inference mode that it was made in
        with torch.inference_mode(False):
            self.kept = torch.tensor(kept, device=device)
            self.index = torch.tensor(places, device=device)

    def index_for(self, z: Tensor) -> Tensor:
        """The index for z (B, S, K), on its device. Raises ValueError where its rows are not those that were named."""
        index = self.index.to(z.device)
        if self.whole:
            return index
        times = _repeated_by_generate()
        if z.dim() == 3 and z.shape[0] == times * index.shape[0]:
            # beams and returned sequences of a prompt stand beside each other
            return index if times == 1 else index.repeat_interleave(times)
        raise ValueError(
            f"handle.rows names the adapters of {index.shape[0]} rows, and this forward has z of shape "
            f"{tuple(z.shape)}: expected ({times * index.shape[0]}, S, K), one name for each row of the batch, "
            "or prompt of generate. Examples that are packed into one row cannot have adapters of their own"
        )


class Adapted(Protocol):
    """A layer, with what scopes show it (here), its own offset, and those of other adapters."""

    inner: nn.Module
    here: Any
    offset: Tensor | None
    offset_heads: Tensor | None
    others: OffsetTable | None

    def own(self, component: str) -> Tensor | None:
        """The vectors of a component as the layer has them, uncast."""


def projected_with(
    layer: Adapted,
    z: Tensor,
    plain: tuple[Tensor, Tensor | None] | None,
    mask: Tensor | None,
    through: Callable[[nn.Module, Tensor], Tensor],
) -> Tensor:
    """y (..., N) of a layer with what is chosen here.

    z: (..., K). plain: (weight, bias) of a base that may be stood in for, None of any other. mask: (..., 1), where
    vectors act; None for everywhere. through: what calls a base that is not plain.
    """
    inner, chosen, table = layer.inner, layer.here.chosen, layer.others
    if chosen.base or table is None:
        return inner(z)
    grad = torch.is_grad_enabled()
    weight = folded_with(plain)
    index = chosen.index_for(z)
    if not torch.compiler.is_compiling():
        table.ready(weight, chosen.room)
    kept: EarlyFold | None = layer.here.kept
    if kept is not None and (weight is None or not kept.counts(weight, layer.own("offset"))):
        kept = None
    own_fold = None if kept is None else kept.exact
    rows = table.rows(chosen.fresh, chosen.kept, weight, _own(layer), own_fold)
    if weight is None:
        return through(inner, add_row_offsets(z, rows, index, mask))
    if chosen.whole and mask is None and PRODUCTS not in inner.__dict__:
        # as one adapter by itself: in the product's own epilogue
        return head_affine_linear(z, *plain, folded=rows.index_select(0, index)[0])
    return add_row_offsets(inner(z), rows, index, mask, inplace=not grad)


def folded_with(plain: tuple[Tensor, Tensor | None] | None) -> Tensor | None:
    """The weight that a table is folded with; None where vectors are added to what the base is called with.

    plain: (weight, bias) of a base that may be stood in for, None of any other.
    """
    # a weight that is trained gets its gradient from all of z
    return None if plain is None or (torch.is_grad_enabled() and plain[0].requires_grad) else plain[0]


def _own(layer: Adapted) -> Vectors | None:
    """The offset of the handle's own adapter at a layer, in float32 at least, and its heads."""
    own = layer.offset
    return None if own is None else (own if own.element_size() >= 4 else own.float(), layer.offset_heads)


def _repeated_by_generate() -> int:
    """How often transformers' generate has each prompt in its batch; 1 outside of it."""
    if torch.compiler.is_compiling():
        return 1
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _GENERATION:
            config = frame.f_locals.get("generation_config")
            if config is not None:
                return max(getattr(config, "num_beams", None) or 1, getattr(config, "num_return_sequences", None) or 1)
        frame = frame.f_back
    return 1
