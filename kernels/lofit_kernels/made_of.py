"""What a W v that is kept was made of: an alarm for tensors that have been replaced, moved or written to since."""

from __future__ import annotations

from torch import Tensor


class MadeOf:
    """A weight and an offset as they are now, for something computed from them to be told from what they are later.

    An alarm, and no proof: a write through `.data` and a fused optimizer move no counter. Nothing that is reused from
    one training step to the next may rest on it. It holds the tensors, so that no other can take their place in memory.
    """

    __slots__ = ("_told", "offset", "weight")

    def __init__(self, weight: Tensor | None = None, offset: Tensor | None = None) -> None:
        self.weight, self.offset = weight, offset
        self._told = told = []
        # made in every forward: straight
        for tensor in (weight, offset):
            if tensor is not None:
                told.append((tensor, tensor.data_ptr(), None if tensor.is_inference() else tensor._version))

    def __reduce__(self) -> tuple:
        # a copy's tensors are others
        return MadeOf, ()

    def fits(self, weight: Tensor | None, offset: Tensor | None = None) -> bool:
        """Whether these are the very tensors, with nothing written to them since as far as torch counts it."""
        # asked in every forward: straight, and what costs least first
        if weight is not self.weight or offset is not self.offset:
            return False
        for tensor, place, written in self._told:
            if tensor.data_ptr() != place or (written is not None and tensor._version != written):
                return False
        return True


def told_by(tensor: Tensor) -> tuple[int, int | None]:
    """(where its numbers begin, how often torch has counted a write to them; None where it does not count)."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version
