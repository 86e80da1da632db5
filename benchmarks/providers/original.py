"""The original implementation's way: a Python loop over heads, each cloned and assigned back."""

from torch import nn

from benchmarks.providers.hook import attached_hook
from benchmarks.providers.provider import Attached
from lofit_fast.baselines.hook import Vectors
from lofit_fast.baselines.original import OriginalLofit


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """The per-head loop on every adapted projection."""
    return attached_hook(model, OriginalLofit(model, vectors))
