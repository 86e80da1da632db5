"""The offsets of several adapters at one projection: W v of each is a row of a table, folded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lofit_fast.patching.one_at_a_time import CHANGING
from lofit_kernels import fold_offset, fold_offsets, head_index
from lofit_kernels.made_of import MadeOf

# (h, D) and the heads (h,) of its rows
Vectors = tuple[Tensor, Tensor]
# the row of zeros, for rows of a batch that are the base's, and the handle's own adapter, which is folded when used
BASE, OWN = 0, 1
# rows that a table has room for at first; then twice as many each time, so that few shapes are ever seen
_FIRST_ROOM = 8


class OffsetTable(nn.Module):
    """What a projection has of the adapters beside the handle's own, by their slots, which the handle gives out.

    frozen ones are buffers (h, D), those that are trained parameters; float32, or float64 after `.double()`, rows by
    ascending head. folded: (room, N), a frozen adapter's W v in the row of its slot, zeros elsewhere; None where the
    weight cannot be read. spread: (room, K), v itself, for a projection that is called as it is.
    """

    folded: Tensor | None
    spread: Tensor

    def __init__(self, n_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, head_dim
        self.heads: dict[int, list[int]] = {}
        # whether all is to be folded anew; else only the slots that have changed since
        self.stale, self._changed = True, set()
        # of the weight that the table has been folded with, and of no vectors: what changes is told by `put` and `drop`
        self._made_of = MadeOf()
        self.register_buffer("folded", None, persistent=False)
        self.register_buffer("spread", torch.zeros(0, n_heads * head_dim, dtype=dtype, device=device), persistent=False)

    def put(self, slot: int, vectors: Tensor, heads: Sequence[int], trained: bool) -> None:
        """Give a slot its vectors (h, D), which are copied."""
        with torch.inference_mode(False):
            own = vectors.detach().to(self.spread.device, self.spread.dtype, copy=True)
        if trained:
            self.register_parameter(f"offset_{slot}", nn.Parameter(own))
        else:
            self.register_buffer(f"offset_{slot}", own, persistent=False)
        self.heads[slot] = list(heads)
        self._changed.add(slot)

    def drop(self, slot: int) -> None:
        """Empty a slot, if this projection has anything of it."""
        if self.heads.pop(slot, None) is not None:
            delattr(self, f"offset_{slot}")
            self._changed.add(slot)

    def vectors(self, slot: int) -> Vectors | None:
        """(vectors (h, D), heads (h,)) of a slot; None where this projection has nothing of it."""
        heads = self.heads.get(slot)
        if heads is None:
            return None
        found = getattr(self, f"offset_{slot}")
        return found, head_index(heads, self.n_heads, found.device)

    def ready(self, weight: Tensor | None, room: int) -> None:
        """Fold what is not folded yet. weight: (N, K) dense, in memory; None where it cannot be read. room: slots."""
        size = max(_FIRST_ROOM, len(self.spread))
        while size < room:
            size *= 2
        anew = self.stale or size != len(self.spread) or not self._made_of.fits(weight)
        if anew or self._changed:
            # adapters come and go in other threads
            with CHANGING, torch.inference_mode(False), torch.no_grad():
                self._fold(weight, size, anew)

    def _fold(self, weight: Tensor | None, size: int, anew: bool) -> None:
        """New tables: a thread that has the old ones goes on with them. anew: all, not only what has changed."""
        if anew:
            spread = self.spread.new_zeros(size, self.n_heads, self.head_dim)
            folded = None if weight is None else self.spread.new_zeros(size, weight.shape[0])
            slots = set(self.heads)
        else:
            # of a hundred adapters that come one by one each is folded once
            spread = self.spread.unflatten(1, (self.n_heads, self.head_dim)).clone()
            folded = None if weight is None else self.folded.clone()
            slots = self._changed
        for slot in slots:
            spread[slot] = 0
            if folded is not None:
                folded[slot] = 0
            # those that are trained are folded when they are used
            if f"offset_{slot}" not in self._buffers:
                continue
            vectors, heads = self.vectors(slot)
            spread[slot, heads] = vectors
            if folded is not None:
                folded[slot] = fold_offset(weight, vectors, heads)
        self.spread, self.folded = spread.flatten(1), folded
        self.stale, self._changed, self._made_of = False, set(), MadeOf(weight)

    def rows(
        self, fresh: Sequence[int], old: Tensor, weight: Tensor | None, own: Vectors | None, kept: Tensor | None
    ) -> Tensor:
        """(A, N) beside a weight, (A, K) without one: the rows of old slots, and then those of fresh ones, folded anew.

        fresh: slots of what is trained, whose vectors may have moved; none means the whole table as it is. own: vectors
        and heads of the handle's own adapter, None where it has none here. kept: its W v, inside `folded`.
        """
        table = self.spread if weight is None else self.folded
        if not fresh:
            return table
        found = {slot: own if slot == OWN else self.vectors(slot) for slot in fresh}
        there = {slot: vectors for slot, vectors in found.items() if vectors is not None}
        made = self._spread_out(there) if weight is None else _folds(weight, there, kept)
        added = torch.stack([made.get(slot, table[BASE]) for slot in fresh])
        return torch.cat((table.index_select(0, old.to(table.device)), added))

    def _spread_out(self, there: dict[int, Vectors]) -> dict[int, Tensor]:
        """v of each slot as (K,), with a graph."""
        empty = self.spread.new_zeros(self.n_heads, self.head_dim)
        return {slot: empty.index_add(0, heads, vectors).flatten() for slot, (vectors, heads) in there.items()}

    def _load_from_state_dict(self, *args) -> None:
        # a state_dict is the base's
        pass

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        # the weight beside it may have changed too
        self.stale = True
        return self


def _folds(weight: Tensor, there: dict[int, Vectors], kept: Tensor | None) -> dict[int, Tensor]:
    """W v of each slot as (N,): with a graph where one is built. kept: that of the handle's own, inside `folded`."""
    grad = torch.is_grad_enabled() and any(vectors.requires_grad for vectors, _ in there.values())
    # the one is an op to a compiler
    if there and (grad or torch.compiler.is_compiling()):
        offsets, heads = zip(*there.values(), strict=True)
        return dict(zip(there, fold_offsets([weight] * len(there), offsets, heads), strict=True))
    return {
        slot: kept if slot == OWN and kept is not None else fold_offset(weight, vectors, heads)
        for slot, (vectors, heads) in there.items()
    }
