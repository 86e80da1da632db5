"""The settings of a comparison: as a method's users run it, as a careful user would, and in our engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from benchmarks.peers.peer import AS_RUN, INT8, SAME_ENGINE, TUNED_STOCK
from lofit_fast.models.device import best_dtype
from lofit_fast.training.engine import Engine

# what transformers does unless told otherwise
STOCK = Engine(
    attention="sdpa",
    compile=False,
    group_by_length=False,
    packing=False,
    narrow=False,
    large_pages=False,
    prepack=False,
)


@dataclass(frozen=True)
class Setting:
    """How a row is run.

    stock: whether it gets a stock Trainer's batches and logits at every position; our collator's otherwise.
    engine: (the settled engine of ours, the stock one) -> the row's.
    autocast: whether steps run under bfloat16 autocast, where the device is fast in it.
    slack: the share of the loss by which a row may be off beyond rounding: 0 for all that is exact.
    """

    stock: bool
    engine: Callable[[Engine, Engine], Engine]
    autocast: bool = False
    slack: float = 0.0

    def computing(self, device: torch.device) -> AbstractContextManager:
        """The scope of a forward pass."""
        wanted = self.autocast and best_dtype(device) == torch.bfloat16
        return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


# no two are ever mixed in one row
SETTINGS = {
    AS_RUN: Setting(True, lambda ours, stock: stock),
    # what somebody who measures would switch on without changing the loop
    TUNED_STOCK: Setting(True, lambda ours, stock: replace(stock, large_pages=True), autocast=True),
    SAME_ENGINE: Setting(False, lambda ours, stock: ours),
    # what 8 bits do to results is measured by itself, see docs/frozen_products.md; here only nonsense is to be noticed
    INT8: Setting(False, lambda ours, stock: replace(ours, frozen_products="int8"), slack=0.05),
}
