"""The frozen floor: the model itself, forward and backward down to the lowest tuned layer, nothing to update."""

import torch
from torch import nn

from benchmarks.peers.peer import Attached, Vectors
from lofit_fast.patching.architectures import find_projections


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """Gradients reach as low as an adapter there needs them, and no lower.

    A zero bias of the lowest projection asks for them: it leaves the loss as it is and costs one column sum, where a
    hook or a leaf among the layers would break compiled graphs, and a leaf below would add part of a layer.
    """
    model.requires_grad_(False)
    lowest = min(layer for layer, _ in vectors)
    linear = next(p.module for p in find_projections(model) if p.layer == lowest)
    linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device))
    return Attached(model, [linear.bias], trains=False)
