"""What the folder `lofit_fast/cpu` offers training, or stand-ins that do nothing where that folder is gone.

This is the one place that knows the folder may be missing. Without it training runs on a CPU as it does elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

try:
    from lofit_fast.cpu.attention import register as register_attention
    from lofit_fast.cpu.heap import held_in_large_pages, release_free_memory

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


__all__ = ["HAS_CPU_EXTRAS", "held_in_large_pages", "register_attention", "release_free_memory"]
