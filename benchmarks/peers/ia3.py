"""IA3 (arXiv:2205.05638), by PEFT: a learnt scale on keys, on values, and on what the down projection is given."""

from torch import nn

from benchmarks.peers.peer import Attached, Vectors
from benchmarks.peers.peft_model import peft_attached


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """The targets are spelt out, because PEFT's defaults differ between models. The vectors play no part."""
    targets = ["k_proj", "v_proj", "down_proj"]
    return peft_attached(model, "IA3Config", target_modules=targets, feedforward_modules=["down_proj"])
