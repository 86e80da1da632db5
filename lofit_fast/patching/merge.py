"""Merging: offsets into the projection's bias, scales into the weight's columns. A merged model is a plain model.

W' = W diag(1 + a)        b' = b + W v
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lofit_fast.patching.architectures import Projection, text_config
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.mergeable import is_transposed, users_of_tensors, why_no_zeros, why_not_plain
from lofit_fast.patching.stock import Biased, Stock, stock_part, ties_as_they_are, untie, with_biases
from lofit_kernels import fold_offset

# of a patched model, by ascending decoder layer
Layers = Mapping[int, LofitLinear]


@dataclass(frozen=True)
class Merge:
    """What merging changes beside the projections, found out before anything is.

    zeros: modules that get a bias of zeros, since the family's code has it wherever it has the projection's.
    biased: how the config is told of these biases; None where it needs not, or cannot. tied: what the config's word on
    tied embeddings should be; None where it is right.
    """

    zeros: list[nn.Module]
    biased: Biased | None
    tied: bool | None


@torch.no_grad()
def merged_tensors(layer: LofitLinear) -> tuple[Tensor, Tensor | None]:
    """(W', b') of one projection in the base layer's dtype and its layout, detached.

    b' is None without a base bias and offsets.
    """
    base = layer.inner
    transposed = is_transposed(base)
    weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
    if layer.offset is not None:
        dtype = weight.dtype if bias is None else bias.dtype
        rows = weight.T.contiguous() if transposed else weight
        bias = fold_offset(rows, layer.offset, layer.offset_heads, bias).to(dtype)
    if layer.scale is not None:
        gain = layer.scale.new_ones(layer.n_heads, layer.head_dim).index_add_(0, layer.scale_heads, layer.scale)
        columns = gain.view(-1, 1) if transposed else gain.view(-1)
        weight = (weight.to(layer.scale.dtype) * columns).to(weight.dtype)
    return weight, bias


def check_mergeable(model: nn.Module, layers: Layers, in_place: bool = True) -> None:
    """Raise ValueError unless every projection that merging changes is plain, and used by nothing else.

    in_place: whether the model's own tensors are written, so that what several projections share stays shared.
    """
    users, holders = users_of_tensors(model), _holders(model)
    for number, layer in layers.items():
        base = layer.inner
        if reason := why_not_plain(base):
            raise ValueError(
                f"cannot merge layer {number}: expected a plain nn.Linear, got {reason}; "
                "merge or dequantize the base first"
            )
        changed = [base.weight] * (layer.scale is not None) + [base.bias] * (layer.offset is not None)
        shared = any(t is not None and len(users[t.data_ptr()]) > 1 for t in changed)
        if len(holders[id(base)]) > 1 or (shared and in_place):
            raise ValueError(
                f"cannot merge layer {number}: its projection's weights are used in several places of the model, "
                "which would all change. Use lofit_fast.export, or keep the adapter folder"
            )
        if in_place and base.weight.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"cannot merge layer {number}: its weights were made in inference mode, and cannot be written; "
                "load the base outside of it"
            )
        if not all(t is None or t.isfinite().all() for t in merged_tensors(layer)):
            raise ValueError(
                f"cannot merge layer {number}: the merged numbers overflow {base.weight.dtype}; load the base in "
                "float32"
            )


def plan_merge(model: nn.Module, layers: Layers, projections: Sequence[Projection]) -> Merge:
    """Find out what merging changes, and change nothing.

    Raises ValueError when a module that merging changes is not plain.
    """
    check_mergeable(model, layers)
    needed = biases_needed(layers, projections)
    found = stock_part(model)
    if found is None:
        return Merge([], None, None)
    prefix, part = found
    tied = ties_as_they_are(part)
    stock = Stock(part.config, type(part))
    biased = with_biases(stock, [name.removeprefix(f"{prefix}.") for name in needed]) if needed else None
    if biased is None:
        return Merge([], None, tied)
    adapted, zeros = set(needed), []
    for key in biased.added:
        name = key.removesuffix(".bias")
        module = part.get_submodule(name)
        module = module.inner if isinstance(module, LofitLinear) else module
        if f"{prefix}.{name}".removeprefix(".") in adapted or getattr(module, "bias", None) is not None:
            continue
        if reason := why_no_zeros(module):
            raise ValueError(
                f"cannot merge offsets: {name} needs a bias of zeros beside them, expected a plain module, got "
                f"{reason}; merge its adapters or dequantize it first"
            )
        zeros.append(module)
    return Merge(zeros, biased, tied)


@torch.no_grad()
def merge_into_base(model: nn.Module, layers: Layers, projections: Sequence[Projection], plan: Merge) -> None:
    """Write W' and b' into the base layers, and set the config so that the model reloads as what it is.

    The base layers are back in the model already. plan: of `plan_merge`.
    """
    needed = biases_needed(layers, projections)
    for layer in layers.values():
        weight, bias = merged_tensors(layer)
        base = layer.inner
        base.weight.copy_(weight)
        if base.bias is not None:
            base.bias.copy_(bias)
        elif bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=base.weight.requires_grad)
    for module in plan.zeros:
        weight = module.weight
        module.bias = nn.Parameter(zero_bias(module), requires_grad=weight.requires_grad)
    found = stock_part(model)
    if found is None:
        return
    _, part = found
    if plan.biased is not None:
        plan.biased.switch_on(part.config)
    elif needed:
        warnings.warn(
            "the merged model is right in memory, but loses its offsets when it is saved and reloaded: no switch known "
            f"here gives the code of {text_config(model).model_type!r} a bias on its output projection. Keep the "
            "adapter folder, or try lofit_fast.export before you merge",
            stacklevel=4,
        )
    if plan.tied is False:
        untie(part.config)
    elif plan.tied:
        part.config.tie_word_embeddings = True


def biases_needed(layers: Layers, projections: Sequence[Projection]) -> list[str]:
    """The names of the projections that have no bias, and offsets to put there."""
    adapted = [(p.name, layers[p.layer]) for p in projections if p.layer in layers]
    return [name for name, layer in adapted if layer.offset is not None and layer.inner.bias is None]


def zero_bias(module: nn.Module) -> Tensor:
    """Zeros (N,) in the module's dtype, on its device."""
    weight = module.weight
    return torch.zeros(weight.shape[1 if is_transposed(module) else 0], dtype=weight.dtype, device=weight.device)


def _holders(model: nn.Module) -> dict[int, set[int]]:
    """The modules that have each module as a child, by id."""
    holders: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for child in module.children():
            holders[id(child)].add(id(module))
    return holders
