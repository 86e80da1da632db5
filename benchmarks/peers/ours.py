"""lofit-fast itself."""

import torch
from torch import Tensor, nn

import lofit_fast as lf
from benchmarks.peers.peer import Attached, Vectors


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """The patched model."""
    heads: dict[str, list] = {"scale": [], "offset": []}
    for (layer, component), (numbers, _) in vectors.items():
        heads[component] += [(layer, number) for number in numbers]
    handle = lf.patch(model, lf.LofitConfig(scale=heads["scale"] or None, offset=heads["offset"] or None))

    @torch.no_grad()
    def assign(values: Vectors) -> None:
        for (layer, component), (_, rows) in values.items():
            getattr(handle.layers[layer], component).copy_(rows)

    scales = [layer.scale for layer in handle.layers.values() if layer.scale is not None]

    def penalty() -> Tensor:
        return torch.cat([scale.flatten() for scale in scales]).abs().sum()

    assign(vectors)
    return Attached(model, list(handle.parameters()), assign, penalty if scales else None)
