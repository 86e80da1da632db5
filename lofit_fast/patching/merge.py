"""Merging: offsets into the projection's bias, scales into the weight's columns. A merged model is a plain model.

W' = W diag(1 + a)        b' = b + W v
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lofit_fast.patching.architectures import Projection, architecture_of, text_config
from lofit_fast.patching.layer import LofitLinear
from lofit_kernels import fold_offset

# of a patched model, by ascending decoder layer
Layers = Mapping[int, LofitLinear]


@torch.no_grad()
def merged_tensors(layer: LofitLinear) -> tuple[Tensor, Tensor | None]:
    """(W', b') of one projection in the base layer's dtype, detached; b' is None without a base bias and offsets."""
    base = layer.inner
    weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
    if layer.offset is not None:
        bias = fold_offset(weight, layer.offset, layer.offset_heads, bias).to(weight.dtype)
    if layer.scale is not None:
        columns = weight.to(layer.scale.dtype).unflatten(1, (layer.n_heads, layer.head_dim))
        gain = torch.ones_like(columns[0]).index_add_(0, layer.scale_heads, layer.scale)
        weight = (columns * gain).flatten(1).to(base.weight.dtype)
    return weight, bias


def check_mergeable(model: nn.Module, layers: Layers, projections: Sequence[Projection]) -> None:
    """Raise ValueError unless every linear that merging changes is a plain nn.Linear with floating weights."""
    for number, layer in layers.items():
        base = layer.inner
        if type(base) is not nn.Linear or not base.weight.is_floating_point() or base.weight.layout != torch.strided:
            raise ValueError(
                f"cannot merge layer {number}: expected a plain nn.Linear, got {type(base).__name__}; "
                "merge or dequantize the base first"
            )
    if needs_bias_flag(layers) and architecture_of(model).bias_flag:
        for projection, name in flagged(model, projections):
            linear = getattr(projection.parent, name)
            if type(linear) not in (nn.Linear, LofitLinear):
                raise ValueError(
                    f"cannot merge offsets: layer {projection.layer}'s {name} needs a bias beside them, but is a "
                    f"{type(linear).__name__}; merge its adapters first"
                )


@torch.no_grad()
def merge_into_base(model: nn.Module, layers: Layers, projections: Sequence[Projection]) -> None:
    """Write W' and b' into the base layers, and set the config so that the model reloads with its biases.

    The base layers are back in the model already.
    """
    architecture, with_flag = architecture_of(model), needs_bias_flag(layers)
    for layer in layers.values():
        weight, bias = merged_tensors(layer)
        base = layer.inner
        base.weight.copy_(weight)
        if base.bias is not None:
            base.bias.copy_(bias)
        elif bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=base.weight.requires_grad)
    if with_flag and architecture.bias_flag is None:
        warnings.warn(
            f"the merged model is right in memory, but the code of {text_config(model).model_type!r} has no "
            "output-projection bias: saved and reloaded, it would lose the offsets. Use lofit_fast.export for that",
            stacklevel=3,
        )
    if not with_flag or architecture.bias_flag is None:
        return
    for projection, name in flagged(model, projections):
        linear = getattr(projection.parent, name)
        if linear.bias is None:
            linear.bias = nn.Parameter(zero_bias(linear), requires_grad=linear.weight.requires_grad)
    setattr(text_config(model), architecture.bias_flag, True)


def needs_bias_flag(layers: Layers) -> bool:
    """Whether merging adds a bias where the base has none."""
    return any(layer.offset is not None and layer.inner.bias is None for layer in layers.values())


def flagged(model: nn.Module, projections: Sequence[Projection]) -> Iterator[tuple[Projection, str]]:
    """(projection, name beside it) of every linear that the family's bias flag gives a bias, in every layer."""
    for projection in projections:
        for name in (*architecture_of(model).biased_siblings, projection.attribute):
            yield projection, name


def zero_bias(linear: nn.Module) -> Tensor:
    """Zeros (N,) in the linear's dtype, on its device."""
    return torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
