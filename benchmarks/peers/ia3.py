"""IA3 (arXiv:2205.05638), by PEFT: a learnt scale on keys, on values, and on what the down projection is given."""

from torch import nn

from benchmarks.peers.peer import Attached, Vectors
from benchmarks.peers.peft_model import PeftLayers, peft_attached

# spelt out, because PEFT's defaults differ between models
_TARGETS: dict = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def make(model: nn.Module, *, seed: int = 42) -> PeftLayers:
    """A number per key, value and FFN dimension of every layer. seed: of nothing, since scales start at one."""
    return PeftLayers(model, "IA3Config", seed=seed, **_TARGETS)


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """The same, in PEFT's own wrapper around the model. The vectors play no part."""
    return peft_attached(model, "IA3Config", **_TARGETS)
