"""The layers that a config puts around a model's projections, made but not put there yet."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lofit_fast.config import HeadSet, LofitConfig, shown
from lofit_fast.patching.acting import Acting
from lofit_fast.patching.architectures import Projection
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.scopes import Scopes
from lofit_fast.patching.tensor_parallel import check_projection
from lofit_fast.torch_defaults import on_the_cpu


@on_the_cpu
def build_layers(model: nn.Module, config: LofitConfig, projections: list[Projection]) -> dict[int, LofitLinear]:
    """The wrappers, filled from the config's seed, attached to nothing yet."""
    scale = _heads_by_layer("scale", config.scale, projections)
    offset = _heads_by_layer("offset", config.offset, projections)
    # drawn on the CPU in float32, whatever torch does by default: a seed means the same on every device
    generator = torch.Generator().manual_seed(config.seed)
    acting = None if config.positions == "all" else Acting()
    layers = {}
    for p in projections:
        heads = (scale.get(p.layer), offset.get(p.layer))
        if heads == (None, None):
            continue
        check_projection(p.name, p.module)
        layer = LofitLinear(p.module, p.n_heads, p.head_dim, *heads, around=list(around_module(model, p.name)))
        layer.acting = acting
        for vectors in layer.parameters(recurse=False):
            draw = torch.randn(vectors.shape, generator=generator, dtype=torch.float32)
            vectors.data.copy_(draw * config.init_std)
        layers[p.layer] = layer
    scopes = Scopes([layer.here for layer in layers.values()])
    for layer in layers.values():
        layer.scopes = scopes
    return layers


def around_module(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that hold the one of that name, the nearest first, the model last."""
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def _heads_by_layer(component: str, heads: HeadSet, projections: list[Projection]) -> dict[int, list[int]]:
    if heads is None:
        return {}
    if heads == "all":
        return {p.layer: list(range(p.n_heads)) for p in projections}
    sizes = {p.layer: p.n_heads for p in projections}
    wrong = [(layer, head) for layer, head in heads if head >= sizes.get(layer, 0)]
    if wrong:
        raise ValueError(
            f"{component} names heads the model does not have: {shown(wrong)}; expected layers up to {max(sizes)} and "
            f"heads below {max(sizes.values())}"
        )
    listed: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        listed.setdefault(layer, []).append(head)
    return listed
