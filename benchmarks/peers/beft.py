"""BEFT, by PEFT: a learnt bias on the value projections."""

from torch import nn

from benchmarks.peers.peer import Attached, Vectors
from benchmarks.peers.peft_model import peft_attached


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """The vectors are LoFiT's and play no part."""
    return peft_attached(model, "BeftConfig", target_modules=["v_proj"])
