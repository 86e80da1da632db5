"""On which tokens of a forward the vectors act: what its layers are told, and the scope in which a caller says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from lofit_fast.patching.entered import around, enter, leave

# every token of the call
EVERYWHERE = "all"
Mask = Tensor | Literal["all"]
SAY_IT = "run it in a scope of handle.acting_on(mask), with a mask (B, S) that is true where the vectors act, or 'all'"
UNKNOWN = (
    "the vectors act on answers alone (positions='answer'), and this forward does not say where the answer begins: "
    f"pass labels, generate with model.generate, or {SAY_IT}"
)


class Acting(threading.local):
    """What the layers of one handle share: where their vectors act in the forward that a thread is in.

    mask: (B, S) bool, or EVERYWHERE; None outside of a forward, and in one of the base. One value per thread, which
    compiled layers read as eager ones do. forwards: the modules whose forwards are going on, the outermost first, each
    with the mask that was there before.
    """

    def __init__(self) -> None:
        # of each thread anew, and there before a compiler looks: what appears while it does ends its graph
        self.mask: Mask | None = None
        self.forwards: tuple = ()

    def __reduce__(self) -> tuple:
        # a copied model has forwards of its own
        return Acting, ()

    @contextmanager
    def during(self, mask: Mask) -> Iterator[None]:
        """A scope in which the layers see a mask in this thread, whatever it does otherwise."""
        before, self.mask = self.mask, mask
        try:
            yield
        finally:
            self.mask = before


@contextmanager
def said(acting: Acting, mask: Mask) -> Iterator[None]:
    """A scope in which forwards of the handle with this `Acting` take the mask. Raises as `checked`."""
    entered = enter(acting, checked(mask))
    try:
        yield
    finally:
        leave(entered)


def said_for(acting: Acting) -> Mask | None:
    """What the innermost scope around says for this handle; None where there is none."""
    return next(reversed(around(acting)), None)


def checked(mask: Mask) -> Mask:
    """The mask. Raises TypeError / ValueError for anything but a bool tensor (B, S) or "all"."""
    if isinstance(mask, str) and mask == EVERYWHERE:
        return EVERYWHERE
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else repr(mask)
        raise TypeError(f"expected a mask of bools (B, S), true where the vectors act, or 'all', got {kind}")
    if mask.dim() != 2:
        raise ValueError(f"expected a mask of shape (B, S), got {tuple(mask.shape)}")
    return mask


def laid_like(mask: Tensor, z: Tensor) -> Tensor:
    """The mask as (..., 1) beside z (..., K), on its device.

    Raises ValueError for another number of tokens, or another order of them.
    """
    tokens = z.shape[:-1]
    if len(tokens) == 1 and mask.numel() == tokens[0]:
        mask = mask.flatten()
    elif mask.shape != tokens:
        raise ValueError(
            f"the vectors act on the tokens of a mask of shape {tuple(mask.shape)}, expected one of {tuple(tokens)}, "
            "as this forward has them: say it anew for each forward, with handle.acting_on(mask)"
        )
    return mask.to(z.device).unsqueeze(-1)
