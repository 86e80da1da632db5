"""What ours does, written in eager PyTorch: vectors folded into the projection's own weight and bias every forward."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.peers.peer import Attached, Vectors
from lofit_fast.patching.architectures import find_projections


class FoldedLinear(nn.Module):
    """y = z (W diag(1 + a))^T + (b + W v), autograd left to itself. scale, offset: (heads, rows) or None."""

    def __init__(self, base: nn.Linear, head_dim: int, scale, offset) -> None:
        super().__init__()
        self.base, self.in_features = base, base.in_features
        self.columns = {}
        for name, given in (("scale", scale), ("offset", offset)):
            self.register_parameter(name, None if given is None else nn.Parameter(given[1].clone()))
            if given is not None:
                columns = torch.arange(base.in_features).unflatten(0, (-1, head_dim))[given[0]].flatten()
                self.columns[name] = columns.to(base.weight.device)

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., K) -> (..., N)."""
        weight, bias = self.base.weight, self.base.bias
        if self.offset is not None:
            shift = weight[:, self.columns["offset"]].float() @ self.offset.flatten()
            bias = shift.to(weight.dtype) if bias is None else (bias + shift).to(weight.dtype)
        if self.scale is not None:
            factor = torch.ones(weight.shape[1], device=weight.device)
            factor = factor.index_copy(0, self.columns["scale"], 1 + self.scale.flatten())
            weight = (weight * factor).to(weight.dtype)
        return linear(z, weight, bias)


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """Every adapted projection replaced."""
    model.requires_grad_(False)
    layers = {}
    for p in find_projections(model):
        scale, offset = vectors.get((p.layer, "scale")), vectors.get((p.layer, "offset"))
        if scale or offset:
            layers[p.layer] = FoldedLinear(p.module, p.head_dim, scale, offset)
            setattr(p.parent, p.attribute, layers[p.layer])

    @torch.no_grad()
    def assign(values: Vectors) -> None:
        for (layer, component), (_, rows) in values.items():
            getattr(layers[layer], component).copy_(rows)

    parameters = [p for layer in layers.values() for p in (layer.scale, layer.offset) if p is not None]
    scales = [layer.scale for layer in layers.values() if layer.scale is not None]

    def penalty() -> Tensor:
        return sum(scale.abs().sum() for scale in scales)

    return Attached(model, parameters, assign, penalty if scales else None)
