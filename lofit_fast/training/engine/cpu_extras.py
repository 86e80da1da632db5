"""What the folder `lofit_fast/cpu` offers training, or stand-ins that do nothing where that folder is gone.

This is the one place that knows the folder may be missing. Without it training runs on a CPU as it does elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

try:
    from lofit_fast.cpu.attention import register as register_attention
    from lofit_fast.cpu.heap import held_in_large_pages, release_free_memory
    from lofit_fast.cpu.prepacked_weights import pays_to_prepack, prepacked, prepacking_refusal

    HAS_CPU_EXTRAS = True
except ModuleNotFoundError as missing:
    if not (missing.name or "").startswith("lofit_fast.cpu"):
        raise
    HAS_CPU_EXTRAS = False

    def register_attention() -> None:
        """Nothing: transformers knows its own attentions."""

    def release_free_memory() -> None:
        """Nothing: what malloc keeps, it keeps."""

    @contextmanager
    def held_in_large_pages(model: nn.Module) -> Iterator[None]:
        """A scope in which nothing is different."""
        yield

    def pays_to_prepack(model: nn.Module) -> bool:
        """False: weights stay as they are."""
        return False

    def prepacking_refusal(model: nn.Module) -> str | None:
        """The reason why weights stay as they are."""
        return "prepacked weights are what the folder lofit_fast/cpu offers, which this installation lacks"

    @contextmanager
    def prepacked(model: nn.Module) -> Iterator[None]:
        """Raises ValueError: there are no prepacked weights."""
        raise ValueError(prepacking_refusal(model))
        yield


__all__ = [
    "HAS_CPU_EXTRAS",
    "held_in_large_pages",
    "pays_to_prepack",
    "prepacked",
    "prepacking_refusal",
    "register_attention",
    "release_free_memory",
]
