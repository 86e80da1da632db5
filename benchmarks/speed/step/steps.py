"""The two rows of every step-level comparison: which heads are adapted, and the vectors they start from."""

import random
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.peers.hook import Vectors
from lofit_fast.config import Head
from lofit_fast.patching.architectures import find_projections

SHARE = 0.1
INIT_STD = 1e-3


def all_heads(model: nn.Module) -> list[Head]:
    """Every (layer, head) of the decoder."""
    return [(p.layer, head) for p in find_projections(model) for head in range(p.n_heads)]


def tenth_with_layer_0(model: nn.Module) -> list[Head]:
    """10 % of the heads drawn from all layers, one of them in layer 0."""
    return _drawn(all_heads(model), len(all_heads(model)), layer=0)


def upper_quarter(model: nn.Module) -> list[Head]:
    """As many heads as 10 % of all, in the upper quarter of the layers, one of them in the lowest layer of those."""
    heads = all_heads(model)
    layers = sorted({layer for layer, _ in heads})
    upper = layers[-(len(layers) // 4) :]
    return _drawn([head for head in heads if head[0] in upper], len(heads), layer=upper[0])


# row -> (component, heads of a model)
STEPS: dict[str, tuple[str, Callable[[nn.Module], list[Head]]]] = {
    "step 1": ("scale", all_heads),
    "step 2": ("offset", tenth_with_layer_0),
    "step 2, upper quarter": ("offset", upper_quarter),
}


def vectors(model: nn.Module, step: str, std: float = INIT_STD, seed: int = 42) -> Vectors:
    """Normal vectors for a row's heads, on their layers' devices: (layer, component) -> (heads, (h, D) float32)."""
    component, choose = STEPS[step]
    chosen = choose(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for p in find_projections(model):
        heads = sorted(head for layer, head in chosen if layer == p.layer)
        if heads:
            rows = torch.randn(len(heads), p.head_dim, generator=generator) * std
            drawn[p.layer, component] = heads, rows.to(next(p.module.parameters()).device)
    return drawn


def _drawn(heads: list[Head], of: int, layer: int) -> list[Head]:
    count = max(1, round(SHARE * of))
    draw = random.Random(0)
    first = draw.choice([head for head in heads if head[0] == layer])
    rest = [head for head in heads if head != first]
    return sorted([first, *draw.sample(rest, min(count - 1, len(rest)))])
