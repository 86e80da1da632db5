"""LoFiT as its authors' release computes it: a Python loop over every head of an adapted layer.

Written from the description of the release (github.com/fc2869/lo-fit, modelling code of December 2024), not from its
code: each head's slice of the attention output is cloned, multiplied by 1 + a, shifted by v and assigned back in place,
heads that are not being tuned included, with a = 0 and v = 0. The release leaves anomaly detection on; here it is off,
which only makes this peer faster.
"""

import torch
from torch import Tensor, nn

from benchmarks.peers.hook import HookLofit, attached_hook
from benchmarks.peers.peer import Attached, Vectors


class OriginalLofit(HookLofit):
    """Constructor, parameters and `remove` as in HookLofit; the edit is the per-head loop."""

    def _edit(self, layer: int):
        def edit(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            scale, offset = (self._by_head(layer, component) for component in ("scale", "offset"))
            # autograd refuses to write in place into a tensor that its producer has saved
            z = args[0].clone()
            head_dim = next(iter({**scale, **offset}.values())).shape[0]
            absent = z.new_zeros(head_dim, dtype=torch.float32)
            for head in range(z.shape[-1] // head_dim):
                columns = slice(head * head_dim, (head + 1) * head_dim)
                a, v = scale.get(head, absent), offset.get(head, absent)
                z[..., columns] = ((1 + a) * z[..., columns].clone() + v).to(z.dtype)
            return (z,)

        return edit

    def _by_head(self, layer: int, component: str) -> dict[int, Tensor]:
        rows = self.parameters.get((layer, component))
        return {} if rows is None else dict(zip(self.heads[layer, component].tolist(), rows, strict=True))


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """The per-head loop on every adapted projection."""
    return attached_hook(model, OriginalLofit(model, vectors))
