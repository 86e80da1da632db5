"""Variants of LoFiT's second step that train every head at once: what a choice of heads, or offsets alone, may cost.

    offsets on all heads     z -> z + v
    scales kept              z -> (1 + a) z + v
    in units of the spread   z -> z + s u,    s = the root of the head's mean variance over tokens

All start from the base model, and each is folded into the projection in the end: v or s u into its bias, a into its
columns. Adam moves every number by about its rate, whatever the size of its gradient. So one step of v is the same for
all heads, while their outputs differ in size by an order of magnitude; a step of u moves each head by one share of how
far its output moves by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.edits import Edits
from lofit_fast.patching.architectures import find_projections
from lofit_kernels import head_affine

# a head whose output never moves has no unit
_LEAST = 1e-6


class WholeHeads(nn.Module):
    """The edit of one layer, all heads. offset: (H, D); scale: (H, D) or None. Zero is the base model.

    in_units: whether offset is in units of each head's spread, (H, 1), which the first batch that is trained on gives.
    """

    def __init__(self, n_heads: int, head_dim: int, scales: bool, in_units: bool) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(n_heads, head_dim))
        self.scale = nn.Parameter(torch.zeros(n_heads, head_dim)) if scales else None
        self.in_units, self.spread = in_units, None

    def forward(self, z: Tensor) -> Tensor:
        """z: (B, S, H D), the attention output before the projection."""
        if self.in_units and self.spread is None and self.training:
            self.spread = spread_of(z.detach(), self.offset.shape).to(self.offset.dtype)
        offset = self.offset if self.spread is None else self.offset * self.spread
        return head_affine(z, scale=self.scale, offset=offset)


def spread_of(z: Tensor, shape: tuple[int, int]) -> Tensor:
    """The root of each head's variance over tokens, averaged over its numbers: (H, 1). z: (..., H D); shape: (H, D)."""
    tokens = z.reshape(-1, *shape).double()
    return tokens.var(0, correction=0).mean(1, keepdim=True).sqrt().clamp_min(_LEAST)


def make(model: nn.Module, *, seed: int = 42, scales: bool = False, in_units: bool = False) -> Edits:
    """D numbers per head, 2 D with scales. seed: of nothing, since all start from the base model."""
    hosts = [
        (found.module, WholeHeads(found.n_heads, found.head_dim, scales, in_units)) for found in find_projections(model)
    ]
    return Edits(model, hosts, of="input")
