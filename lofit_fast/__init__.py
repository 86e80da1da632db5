"""lofit-fast: LoFiT, localized fine-tuning of attention heads, fast and whole (arXiv:2406.01563)."""

from lofit_fast.config import LofitConfig, Recipe
from lofit_fast.heads import head_scores, select_heads
from lofit_fast.merge import export, verify_export
from lofit_fast.patch import LofitHandle, handle_of, load, patch

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "LofitConfig",
    "LofitHandle",
    "Recipe",
    "export",
    "fit",
    "handle_of",
    "head_scores",
    "load",
    "patch",
    "select_heads",
    "verify_export",
]


def __getattr__(name: str):
    # training pulls in transformers' Trainer: loaded when asked for, so that importing the package stays light
    if name in ("Engine", "fit"):
        from lofit_fast import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
