"""What a provider is: a way to put something trainable into a model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.peers.hook import Vectors

AS_RUN, SAME_ENGINE = "as run", "same engine"


class Absent(Exception):
    """Why something cannot be measured here."""


@dataclass(frozen=True)
class Attached:
    """A provider in a model.

    model: what is called. parameters: what is trained. assign: sets the LoFiT vectors, for those that have them.
    penalty: the plain sum |a| that the L1 term multiplies, the way this provider's users write it; None without scales.
    trains: False for the floor, whose step ends with the backward pass.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    assign: Callable[[Vectors], None] | None = None
    penalty: Callable[[], Tensor] | None = None
    trains: bool = True


@dataclass(frozen=True)
class Provider:
    """A row of the table.

    label: for people. attach: (fresh model copy, vectors) -> Attached; raises Absent where it cannot be had.
    lofit: whether it computes the same function as ours of the same vectors; the others start as the base model and
    do not depend on the step.
    """

    label: str
    attach: Callable[[nn.Module, Vectors], Attached]
    lofit: bool
