"""JoLA (arXiv:2502.01179): on every head a gated scale and a gated offset, heads and components chosen while training.

z -> (1 + g2 a) z + g1 v with g1, g2 in [0, 1] per head: hard concrete gates (arXiv:1712.01312), so that a gate can be
exactly closed and still has a gradient. The penalty is the expected number of open gates.

The authors' trainer weighs the gates by a schedule and keeps the best of 20 epochs. Ours does neither: `gate_weight`
is constant, and what the last step leaves is evaluated.
"""

import math

import torch
from torch import Tensor, nn

from benchmarks.peers.edits import Edits
from lofit_fast.patching.architectures import find_projections
from lofit_kernels import head_affine

# the release's, github.com/wenlai-lavine/jola
TEMPERATURE, LOW, HIGH = 0.33, -0.1, 1.1
_NOISE = 1e-6


class GatedHeads(nn.Module):
    """The edit of one layer. scale, offset: (H, D) from zero, the base model; their gates: (H,) log odds, from zero."""

    def __init__(self, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(n_heads, head_dim))
        self.offset = nn.Parameter(torch.zeros(n_heads, head_dim))
        self.scale_gate = nn.Parameter(torch.zeros(n_heads))
        self.offset_gate = nn.Parameter(torch.zeros(n_heads))

    def forward(self, z: Tensor) -> Tensor:
        """z: (B, S, H D), the attention output before the projection."""
        a = gate(self.scale_gate, self.training)[:, None] * self.scale
        v = gate(self.offset_gate, self.training)[:, None] * self.offset
        return head_affine(z, scale=a, offset=v)

    def open_gates(self) -> Tensor:
        """The expected number of gates that are not closed, a scalar: sum of P(gate > 0)."""
        shift = TEMPERATURE * math.log(-LOW / HIGH)
        return torch.sigmoid(torch.cat((self.scale_gate, self.offset_gate)) - shift).sum()


class Jola(Edits):
    """Edits with a penalty. gate_weight: of each expected open gate, added to the loss."""

    def __init__(self, model: nn.Module, gate_weight: float) -> None:
        self.gate_weight = gate_weight
        hosts = [(p.module, GatedHeads(p.n_heads, p.head_dim)) for p in find_projections(model)]
        super().__init__(model, hosts, of="input")

    def penalty(self) -> Tensor:
        """gate_weight x the expected number of open gates, a scalar."""
        return self.gate_weight * torch.stack([edit.open_gates() for _, edit in self.hosts]).sum()


def make(model: nn.Module, *, seed: int = 42, gate_weight: float = 4e-5) -> Jola:
    """2 D + 2 parameters per head. seed: of nothing: it starts from the base model, and its gates draw in training."""
    return Jola(model, gate_weight)


def gate(log_odds: Tensor, sampled: bool) -> Tensor:
    """Hard concrete gates in [0, 1], in log_odds' shape: a sample of each, or (not sampled) the gate without noise."""
    if sampled:
        noise = torch.rand_like(log_odds).clamp(_NOISE, 1 - _NOISE)
        soft = torch.sigmoid((noise.log() - (1 - noise).log() + log_odds) / TEMPERATURE)
    else:
        soft = torch.sigmoid(log_odds)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)
