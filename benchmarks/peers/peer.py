"""What a peer is: a row of `table.PEERS`, and what it leaves in a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from lofit_fast.training.engine.attachment import Attachment

# how a peer is run, see `benchmarks.speed.step.row_settings`
AS_RUN, TUNED_STOCK, SAME_ENGINE, INT8 = "as run", "tuned stock", "same engine", "int8"

# (layer, component) -> (heads, rows (h, D)); component is "scale" or "offset"
Vectors = dict[tuple[int, str], tuple[list[int], Tensor]]


class Absent(Exception):
    """Why something cannot be measured here."""


@dataclass(frozen=True)
class Attached:
    """A peer in a model, ready for training steps.

    model: what is called. parameters: what is trained. assign: sets the LoFiT vectors, for those that have them.
    penalty: the plain sum |a| that the L1 term multiplies, the way this peer's users write it; None without scales.
    trains: False for the floor, whose step ends with the backward pass.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    assign: Callable[[Vectors], None] | None = None
    penalty: Callable[[], Tensor] | None = None
    trains: bool = True


@dataclass(frozen=True)
class Peer:
    """A row of the table. A peer is timed, or compared in accuracy, or both.

    label: its name for people.
    computes: "ours" if it computes the same function of the same vectors as lofit-fast; "other" if not. A peer of
    the second kind starts as the base model, and its step timings do not depend on LoFiT's step.

    For step timings. attach: (fresh copy of a model, vectors) -> Attached; raises Absent where the peer cannot be had.

    For accuracy. make: of a "trained" peer (model, seed=..., **options) -> Attachment, which is then trained; of a
    "fitted" one (model, tokenizer, contrasts, seed=..., **options) -> Attachment, which is finished. lr, options: used
    where nothing is tuned; lr is 0 for a fitted one. tuning: settings to choose from on held-out training data, each a
    dict of what it changes: "lr", options, or both.
    """

    label: str
    computes: Literal["ours", "other"] = "other"
    attach: Callable[[nn.Module, Vectors], Attached] | None = None
    make: Callable[..., Attachment] | None = None
    kind: Literal["trained", "fitted"] | None = None
    lr: float = 0.0
    options: dict = field(default_factory=dict)
    tuning: tuple[dict, ...] = ()
