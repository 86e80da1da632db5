"""A frozen weight in another layout, which an op finds by a number: a compiler cannot take every layout in a graph."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from lofit_kernels.made_of import told_by

_CLOSED = "a product with a weight in another layout was asked for after its scope had ended"
_numbers = count()
_held: dict[int, HeldWeight] = {}
# by bytes of a number: what its bits are compared as, so that NaN is itself
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# rows and columns of a weight that are looked at for writes that torch does not count
_LOOKED_AT = (8, 4)


class HeldWeight:
    """A weight (N, K), laid out for W when y is first computed and for W^T when dz is, until `close`.

    It must not change once it has been used. key: () int64 on the CPU, by which an op finds it. is_open: until `close`.
    """

    # what it does to a weight, and the scope it does so in, as errors name them
    done, scope = "laid out anew", "the scope that did so"

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.is_open = weight, True
        self._packed: dict[bool, Any] = {}
        self._looks = _Looks(weight)
        number = next(_numbers)
        # whatever the default device is
        self.key = torch.tensor(number, device="cpu")
        _held[number] = self

    def packed(self, backward: bool) -> Any:
        """What a product multiplies by: W for y, W^T for dz.

        Raises RuntimeError after `close`, and where `has_changed`.
        """
        if not self.is_open:
            raise RuntimeError(_CLOSED)
        if self.has_changed():
            raise RuntimeError(f"a weight has changed after it was {self.done}: load weights before {self.scope}")
        if not self.is_used():
            # it may have changed until now
            self._looks = _Looks(self.weight)
        if backward not in self._packed:
            self._packed[backward] = self.pack(backward)
        return self._packed[backward]

    def has_changed(self) -> bool:
        """Whether the weight is seen to be another than when it was used first.

        A write through `.data` or NumPy is seen where it reaches the few numbers of a weight on a CPU that are looked
        at; one that changes most of the weight does.
        """
        return self.is_used() and not self._looks.fit(self.weight)

    def is_used(self) -> bool:
        """Whether something has been computed from the weight that is kept."""
        return bool(self._packed)

    def pack(self, backward: bool) -> Any:
        """What `packed` keeps."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget the packed weights: what computes with them afterwards is refused."""
        self.is_open = False
        _held.pop(int(self.key), None)
        self._packed.clear()


def held_weight(key: Tensor) -> HeldWeight:
    """The weight behind a key. Raises RuntimeError for one that is closed."""
    found = _held.get(int(key))
    if found is None:
        raise RuntimeError(_CLOSED)
    return found


class _Looks:
    """What is known of a weight's numbers: where they are, how often torch has counted a write, and some of them."""

    def __init__(self, weight: Tensor) -> None:
        self.place = told_by(weight)
        # a look at another device would wait for it
        looked_at = weight.device.type == "cpu" and weight.numel() and weight.element_size() in _BITS
        self.there = self.kept = None
        if looked_at:
            rows, columns = (-(-size // most) for size, most in zip(weight.shape, _LOOKED_AT, strict=True))
            self.there = weight.detach().view(_BITS[weight.element_size()])[::rows, ::columns]
            self.kept = self.there.clone()

    def fit(self, weight: Tensor) -> bool:
        """Whether they are still so."""
        return told_by(weight) == self.place and (self.there is None or torch.equal(self.there, self.kept))
