"""RED (arXiv:2402.15179): a scale and a bias per hidden dimension on what every layer's FFN puts out."""

import torch
from torch import Tensor, nn

from benchmarks.peers.edits import Edits
from lofit_fast.patching.architectures import architecture_of, decoder_layers, text_config
from lofit_kernels import head_affine


class ScaleAndBias(nn.Module):
    """h -> (1 + a) * h + v with a, v of shape (1, N): LoFiT's op with the whole hidden state as its only head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # RED's scale starts at one and its bias at zero: the base model
        self.scale = nn.Parameter(torch.zeros(1, width))
        self.offset = nn.Parameter(torch.zeros(1, width))

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, S, N)."""
        return head_affine(h, scale=self.scale, offset=self.offset)


def make(model: nn.Module, *, seed: int = 42) -> Edits:
    """2 N parameters per layer. seed: of nothing, since RED starts from the base model."""
    width, ffn = text_config(model).hidden_size, architecture_of(model).ffn
    return Edits(model, [(layer.get_submodule(ffn), ScaleAndBias(width)) for layer in decoder_layers(model)])
