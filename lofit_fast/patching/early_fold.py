"""W v that was computed before its projection's forward, and whether it still counts when the forward comes."""

from __future__ import annotations

import sys
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from lofit_kernels.layer_fold import Folded
from lofit_kernels.made_of import MadeOf


class Call:
    """A call of a module that goes on, in the thread that asks: what it has left counts until it has ended.

    torch runs no hook after KeyboardInterrupt, or whatever else is no Exception. frame: the one that runs the module.
    """

    __slots__ = ("_depth", "_frame")

    def __init__(self, frame: FrameType) -> None:
        self._frame, self._depth = frame, 0

    def goes_on(self) -> bool:
        """Whether the frame is on this thread's stack."""
        # where it was for the layer before: one look in place of a walk, which takes as long as a launch
        try:
            if sys._getframe(self._depth) is self._frame:
                return True
        except ValueError:
            # a stack of fewer frames
            pass
        depth, frame = 0, sys._getframe()
        while frame is not None and frame is not self._frame:
            depth, frame = depth + 1, frame.f_back
        if frame is not None:
            self._depth = depth
        return frame is not None


class EarlyFold(NamedTuple):
    """W v (N,) of one projection, by a fold of the whole model or inside `folded`.

    weight: W (N, K). made_of: of W and v; None where it was folded in a graph, which cannot be told more than W. ready:
    the same for `folded_linear`. call: the forward that it was folded for; None for all of a scope.
    """

    exact: Tensor
    weight: Tensor
    made_of: MadeOf | None = None
    ready: Folded | None = None
    call: Call | None = None

    def counts(self, weight: Tensor, offset: Tensor | None) -> bool:
        """Whether it is W v of these tensors as they are, and not left by a forward that was interrupted.

        offset: the layer's own, uncast.
        """
        if torch.compiler.is_dynamo_compiling():
            return self.weight is weight
        made_of = self.made_of
        if made_of is None or not made_of.fits(weight, offset):
            return False
        return self.call is None or self.call.goes_on()
