"""The project's hook-based LoFiT as the tests' oracle: it shares no code with the op or the patcher."""

import torch

from benchmarks.peers.hook import HookLofit as Hook
from benchmarks.peers.hook import Vectors, vectors_of

__all__ = ["Hook", "Vectors", "randomize", "vectors_of"]


@torch.no_grad()
def randomize(handle, std: float = 0.3, seed: int = 7) -> None:
    """Vectors large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in handle.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
