"""BEFT (arXiv:2509.15974), by PEFT: a learnt bias on the value projections."""

import warnings

from torch import nn

from benchmarks.peers.peer import Attached, Vectors
from benchmarks.peers.peft_model import PeftLayers, peft_attached

_TARGETS: dict = {"target_modules": ["v_proj"]}


def make(model: nn.Module, *, seed: int = 42) -> PeftLayers:
    """A number per value dimension of every layer. seed: of nothing, since biases start at zero."""
    with warnings.catch_warnings():
        # that biases could not be merged, which nobody does here
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias")
        return PeftLayers(model, "BeftConfig", seed=seed, **_TARGETS)


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """The same, in PEFT's own wrapper around the model. The vectors are LoFiT's and play no part."""
    return peft_attached(model, "BeftConfig", **_TARGETS)
