"""The original implementation's way: a Python loop over heads, each cloned and assigned back."""

from torch import nn

from benchmarks.peers.hook import Vectors
from benchmarks.peers.original import OriginalLofit
from benchmarks.peers.provider import Attached
from benchmarks.peers.step_hook import attached_hook


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """The per-head loop on every adapted projection."""
    return attached_hook(model, OriginalLofit(model, vectors))
