"""What every method that edits a model gives back, ours included: parameters, a switch, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn


class Attachment(Protocol):
    """A method in a model. `LofitHandle` is one.

    One that has a term of its own in the loss also has `penalty() -> Tensor`, a scalar; trainers add it.
    One that must know the examples of a batch apart has `takes_packed_rows = False`.
    """

    model: nn.Module

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained; empty for a method that is fitted in closed form."""

    def n_parameters(self) -> int:
        """How many numbers the method adds to the model, trained or fitted."""

    def disabled(self) -> AbstractContextManager[None]:
        """A scope in which the model computes what the base computes."""

    def unpatch(self) -> nn.Module:
        """Take the method out; the model is as it was before."""
