"""Checkpoints that others' code has written, read as adapters for the base that they were made from.

* lo-fit, the paper's code (github.com/fc2869/lo-fit): a whole saved model with a tensor (D,) for every head of every
  layer, `<attention>.attn_A.<head>` and `<attention>.attn_v.<head>`. z -> (1 + A) z + v before the output projection,
  which is what scales and offsets are here. Heads whose vector is zero were not tuned.
* ITI (github.com/likenneth/honest_llama), and models with their offsets put in: a plain model whose output projections
  have biases that the base lacks. Such a bias b is W v of an offset v: solved for, on as few heads as give it.

Only the tensors of the adapter are read, and the projections' weights of the same layers, to tell another base and to
solve for what a bias was made of.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lofit_fast.config import LofitConfig, shown
from lofit_fast.patching.architectures import Fingerprint, Projection
from lofit_fast.patching.placement import is_dense
from lofit_fast.patching.storage import CONFIG_FILE, Adapter, check_finite
from lofit_fast.patching.weight_files import has_weights, saved_tensors
from lofit_fast.patching.weight_sample import base_name

_OF_A_HEAD = re.compile(r"(?P<attention>.+)\.attn_(?P<letter>[Av])\.(?P<head>0|[1-9]\d{0,5})")
_COMPONENTS = {"A": "scale", "v": "offset"}
# heads that have less of the largest head's norm are tried without
_LITTLE = 1e-2
# what float32 makes of W v
_ROUNDING = 1e-5


def is_published(path: Path) -> bool:
    """Whether a path holds weights, and no adapter of ours."""
    return has_weights(path) and not (path / CONFIG_FILE).exists()


def read_published(
    path: Path, model: nn.Module, projections: Sequence[Projection], shape: Fingerprint, strict: bool
) -> Adapter:
    """The adapter in somebody else's checkpoint.

    path: a folder of a saved model, or its file of weights. model, projections, shape: the base, not patched.
    Warns, or with strict raises ValueError, where the checkpoint's projections have other weights than the model's.
    Raises FileNotFoundError for missing files; ValueError for damaged ones, pickles of more than tensors, vectors of
    another shape, a checkpoint with nothing in it that differs from the base, or biases that no offset gives.
    """
    saved = saved_tensors(path)
    by_name = {p.name.removeprefix("base_model.model."): p for p in projections}
    vectors = _lofit_vectors(path, saved, by_name)
    if not vectors:
        vectors = _bias_vectors(path, saved, by_name)
    config, tensors = _of_heads(path, vectors)
    check_finite(tensors, str(path))
    tuned = {layer for _, layer in tensors}
    modules = {p.layer: name for name, p in by_name.items() if p.layer in tuned}
    _check_weights(path, saved, {name: by_name[name] for name in modules.values()}, model, strict)
    return Adapter(config, tensors, shape, base_name(model), modules)


def _lofit_vectors(
    path: Path, saved: Mapping[str, Tensor], projections: Mapping[str, Projection]
) -> dict[tuple[str, int], dict[int, Tensor]]:
    """lo-fit's vectors by (component, layer) and head, in float32; nothing for a checkpoint that has none."""
    found = [match for match in map(_OF_A_HEAD.fullmatch, saved) if match is not None]
    places = {name.rpartition(".")[0]: p for name, p in projections.items()}
    vectors: dict[tuple[str, int], dict[int, Tensor]] = {}
    for match in found:
        projection = places.get(match["attention"])
        if projection is None:
            raise ValueError(
                f"{path} is for another model: it has {shown(match[0])}, and this model's output projections are in "
                f"{', '.join(list(places)[:2])}, ..."
            )
        vector = _checked(path, match[0], saved[match[0]], projection.head_dim)
        vectors.setdefault((_COMPONENTS[match["letter"]], projection.layer), {})[int(match["head"])] = vector
    if vectors:
        _check_whole(path, vectors, projections)
    return vectors


def _checked(path: Path, name: str, vector: Tensor, head_dim: int) -> Tensor:
    if tuple(vector.shape) != (head_dim,) or not vector.is_floating_point():
        raise ValueError(
            f"{path} holds {name} as {tuple(vector.shape)} {vector.dtype}: expected ({head_dim},) floating numbers"
        )
    return vector.float()


def _check_whole(
    path: Path, vectors: Mapping[tuple[str, int], Mapping[int, Tensor]], projections: Mapping[str, Projection]
) -> None:
    """Raise ValueError unless there is a vector of each kind for every head of every layer, as the code saves them."""
    for p in projections.values():
        for letter, component in _COMPONENTS.items():
            heads = vectors.get((component, p.layer), {})
            if sorted(heads) != list(range(p.n_heads)):
                raise ValueError(
                    f"{path} is not whole, or for another model: attn_{letter} of layer {p.layer} is there for "
                    f"{len(heads)} heads, expected heads 0 to {p.n_heads - 1}"
                )


def _bias_vectors(
    path: Path, saved: Mapping[str, Tensor], projections: Mapping[str, Projection]
) -> dict[tuple[str, int], dict[int, Tensor]]:
    """Offsets, by ("offset", layer) and head, that give the biases which a plain model has beyond the base's."""
    vectors: dict[tuple[str, int], dict[int, Tensor]] = {}
    biases = {name: f"{name}.bias" for name in projections if f"{name}.bias" in saved}
    if not biases:
        raise ValueError(
            f"{path} holds no adapter: expected {CONFIG_FILE}, or the tensors attn_A and attn_v of lo-fit, or biases "
            f"on the output projections, such as {next(iter(projections))}.bias"
        )
    for name, bias_name in biases.items():
        p, bias = projections[name], saved[bias_name]
        weight = getattr(p.module, "weight", None)
        if type(p.module) is not nn.Linear or not _is_here(weight):
            raise ValueError(f"{path}: the offset of a bias is solved for in a plain linear, and {name} is none here")
        if tuple(bias.shape) != (len(weight),) or not bias.is_floating_point():
            raise ValueError(
                f"{path} holds {bias_name} as {tuple(bias.shape)} {bias.dtype}: expected ({len(weight)},) floating "
                "numbers"
            )
        own = torch.zeros_like(bias) if p.module.bias is None else p.module.bias.detach().cpu()
        beyond = bias.double() - own.double()
        if not beyond.isfinite().all():
            raise ValueError(f"{path}: {bias_name} has numbers that are not finite")
        if beyond.count_nonzero():
            rounding = max(_ROUNDING, torch.finfo(bias.dtype).eps)
            # as it was when the bias was made: the model here may be rounded to fewer digits
            theirs = saved.get(f"{name}.weight", weight)
            made_by = theirs if theirs.is_floating_point() and theirs.shape == weight.shape else weight
            vectors["offset", p.layer] = _solved(f"{path}: {bias_name}", p, made_by, beyond, rounding)
    return vectors


def _solved(where: str, projection: Projection, weight: Tensor, bias: Tensor, rounding: float) -> dict[int, Tensor]:
    """v by head with W v = bias up to rounding, on as few heads as give it, in float32.

    weight: W (N, K). bias: (N,) float64. Raises ValueError, beginning with `where`, for a bias that is no W v.
    """
    weight = weight.detach().cpu().double()
    every = torch.arange(projection.n_heads)
    vectors = _least_squares(weight, bias, every, projection.head_dim)
    missed = _missed(weight, bias, every, vectors) / bias.norm()
    if not missed <= rounding:
        raise ValueError(f"{where} is no offset of heads: the nearest one misses it by {missed:.1%} of its norm")
    norms = vectors.norm(dim=1)
    large = every[norms > _LITTLE * norms.max()]
    fewer = _least_squares(weight, bias, large, projection.head_dim)
    if _missed(weight, bias, large, fewer) <= rounding * bias.norm():
        every, vectors = large, fewer
    return {int(head): vector.float() for head, vector in zip(every, vectors, strict=True)}


def _least_squares(weight: Tensor, bias: Tensor, heads: Tensor, head_dim: int) -> Tensor:
    """(heads, D) float64: the smallest vectors of these heads that come nearest to the bias."""
    columns = weight.unflatten(1, (-1, head_dim))[:, heads].flatten(1)
    return torch.linalg.lstsq(columns, bias.unsqueeze(1), driver="gelsy").solution.view(len(heads), head_dim)


def _missed(weight: Tensor, bias: Tensor, heads: Tensor, vectors: Tensor) -> Tensor:
    """The norm of W v - bias, of the v that is kept: in float32."""
    columns = weight.unflatten(1, (-1, vectors.shape[1]))[:, heads].flatten(1)
    return (columns @ vectors.float().double().flatten() - bias).norm()


def _of_heads(
    path: Path, vectors: Mapping[tuple[str, int], Mapping[int, Tensor]]
) -> tuple[LofitConfig, dict[tuple[str, int], Tensor]]:
    """(config, tensors) of an adapter of the heads whose vectors are not zero."""
    heads: dict[str, list[tuple[int, int]]] = {}
    tensors: dict[tuple[str, int], Tensor] = {}
    for (component, layer), by_head in sorted(vectors.items()):
        tuned = [head for head, vector in sorted(by_head.items()) if vector.count_nonzero()]
        if tuned:
            heads.setdefault(component, []).extend((layer, head) for head in tuned)
            tensors[component, layer] = torch.stack([by_head[head] for head in tuned])
    if not tensors:
        raise ValueError(f"{path} holds no adapter: all of its vectors are zero, or its biases are the base's")
    return LofitConfig(scale=heads.get("scale"), offset=heads.get("offset")), tensors


def _check_weights(
    path: Path, saved: Mapping[str, Tensor], projections: Mapping[str, Projection], model: nn.Module, strict: bool
) -> None:
    """Warn, or raise ValueError, where the tuned layers' projections have other weights than the checkpoint's."""
    for name, p in projections.items():
        weight = getattr(p.module, "weight", None)
        if f"{name}.weight" not in saved or not _is_here(weight):
            continue
        theirs, ours = saved[f"{name}.weight"], weight.detach().cpu()
        if not theirs.is_floating_point() or (theirs.shape == ours.shape and _are_equal(theirs, ours)):
            continue
        message = (
            f"the checkpoint {path} was made from another base than this model, {base_name(model) or 'a model'}: "
            f"their {name}.weight differ"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=6)
        return


def _is_here(weight: Tensor | None) -> bool:
    """Whether a weight's numbers are plain, and in memory."""
    return weight is not None and is_dense(weight) and not weight.is_meta


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one, each rounded to the coarser dtype of both; between two 16-bit dtypes nearly."""
    eps = [torch.finfo(t.dtype).eps for t in (first, second)]
    coarser = (first, second)[eps[1] > eps[0]].dtype
    if {first.dtype, second.dtype} == {torch.float16, torch.bfloat16}:
        return torch.allclose(first.double(), second.double(), rtol=max(eps), atol=1e-6)
    return torch.equal(first.to(coarser), second.to(coarser))
