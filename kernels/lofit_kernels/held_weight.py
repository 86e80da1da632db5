"""A frozen weight in another layout, which an op finds by a number: a compiler cannot take every layout in a graph."""

from __future__ import annotations

import copy
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

_CLOSED = "a product with a weight in another layout was asked for after its scope had ended"
_numbers = count()
_held: dict[int, HeldWeight] = {}


class HeldWeight:
    """A weight (N, K), laid out for W when y is first computed and for W^T when dz is, until `close`.

    It must not change once it has been used. key: () int64 on the CPU, by which an op finds it.
    """

    # what it does to a weight, and the scope it does so in, as errors name them
    done, scope = "laid out anew", "the scope that did so"

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._packed: dict[bool, Any] = {}
        self._version, self._copies = _version_of(weight), []
        self.is_closed = False
        number = next(_numbers)
        self.key = torch.tensor(number)
        _held[number] = self

    def packed(self, backward: bool) -> Any:
        """What a product multiplies by: W for y, W^T for dz.

        Raises RuntimeError after `close`, and where the weight is seen to have changed since it was used first; a write
        through `.data` is not seen.
        """
        if self.is_closed:
            raise RuntimeError(_CLOSED)
        version = _version_of(self.weight)
        if version != self._version and self.is_used():
            raise RuntimeError(f"a weight has changed after it was {self.done}: load weights before {self.scope}")
        self._version = version
        if backward not in self._packed:
            self._packed[backward] = self.pack(backward)
        return self._packed[backward]

    def is_used(self) -> bool:
        """Whether something has been computed from the weight that is kept."""
        return bool(self._packed)

    def pack(self, backward: bool) -> Any:
        """What `packed` keeps."""
        raise NotImplementedError

    def copied(self, memo: dict) -> HeldWeight:
        """The same for a copy of the weight."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget the packed weights, those of copies too: what computes with them afterwards is refused."""
        _held.pop(int(self.key), None)
        self.is_closed = True
        self._packed.clear()
        for held in self._copies:
            held.close()

    def __deepcopy__(self, memo: dict) -> HeldWeight:
        # a copied model has weights of its own, which may be given other numbers
        self._copies.append(self.copied(memo))
        return self._copies[-1]

    def __reduce__(self) -> tuple:
        # its number means nothing in another process, or another weight
        raise TypeError(
            f"expected to pickle a model as it was loaded, got one whose weights are {self.done}: save it after "
            f"{self.scope}, or save its state_dict"
        )


def held_weight(key: Tensor) -> HeldWeight:
    """The weight behind a key. Raises RuntimeError for one that is closed."""
    found = _held.get(int(key))
    if found is None:
        raise RuntimeError(_CLOSED)
    return found


def copied_weight(held: HeldWeight, memo: dict) -> nn.Parameter:
    """The weight's own copy in a deep copy of its model."""
    return copy.deepcopy(held.weight, memo)


def _version_of(weight: Tensor) -> int:
    """How often a tensor has been written to; 0 where torch does not count."""
    return 0 if weight.is_inference() else weight._version
