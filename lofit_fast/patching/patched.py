"""What may be asked of any model, patched or not: its handle, and scopes that hold for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.output_head import whole_head_input

if TYPE_CHECKING:
    from lofit_fast.patching.acting import Mask
    from lofit_fast.patching.handle import LofitHandle


def handle_of(model: nn.Module) -> LofitHandle | None:
    """The handle of a patched model, or None."""
    return next((module.handle for module in model.modules() if isinstance(module, LofitLinear)), None)


@contextmanager
def acting_on(model: nn.Module, mask: Mask) -> Iterator[None]:
    """`handle.acting_on` of a model whose vectors act on answers alone; nothing changes for any other."""
    handle = handle_of(model)
    alone = handle is not None and handle.acting is not None
    with handle.acting_on(mask) if alone else nullcontext():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A scope in eval mode without gradients, with the offsets folded if the model is patched.

    Raises ValueError inside of `handle.rows`: what is evaluated comes in batches of its own order and size.
    """
    handle = handle_of(model)
    if handle is not None and handle.rows_differ:
        raise ValueError(
            "cannot evaluate inside handle.rows(): examples are put into batches by their lengths, and would meet "
            "other rows' adapters. Evaluate one adapter at a time, with handle.set_active(name)"
        )
    without_grad = torch.no_grad() if handle is None else handle.folded()
    with eval_mode(model), whole_head_input(model), without_grad:
        yield
