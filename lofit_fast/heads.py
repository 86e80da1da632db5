"""Which heads matter: scores of several kinds, all (layers, heads), and the best of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lofit_fast.config import Head, check_top
from lofit_fast.patching.architectures import Projection, find_projections

if TYPE_CHECKING:
    from lofit_fast.patching.handle import LofitHandle

# torch's default
_ADAM_EPS = 1e-8


@torch.no_grad()
def head_scores(handle: LofitHandle) -> Tensor:
    """The L2 norm of every head's scale vector (arXiv:2406.01563, section 3): (layers, heads) float32 on the CPU.

    Rows are layer numbers. Heads without a scale, and layers without attention, score minus infinity.
    Raises ValueError when the handle trains no scale.
    """
    return _norms(handle, "scale")


@torch.no_grad()
def offset_norms(handle: LofitHandle) -> Tensor:
    """The L2 norm of every head's offset vector, the bias norm: as `head_scores`, for offsets trained on all heads."""
    return _norms(handle, "offset")


def random_scores(model: nn.Module, seed: int) -> Tensor:
    """A number from [0, 1) per head, the same on every device: (layers, heads) float32, shaped as `head_scores`."""
    projections = find_projections(model)
    scores = _no_scores(projections)
    drawn = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    for p in projections:
        scores[p.layer, : p.n_heads] = drawn[p.layer, : p.n_heads]
    return scores


def saliency_scores(handle: LofitHandle, losses: Iterable[Tensor], l1: float = 0.0) -> Tensor:
    """How far step 1's optimizer would move every head's scale, judged from the gradients at zero: (layers, heads).

    losses: one scalar per batch, each with the graph of a forward pass of the handle's model, taken one at a time; the
    scales should be zero (LofitConfig(scale="all", init_std=0)). Nothing is updated. l1: the recipe's.
    With m the mean and r the root mean square of the gradient over the batches, a component is pushed by
    s = (|m| - l1) / (r + 1e-8): Adam divides by r, and a push below l1 does not get past the penalty. The score is
    |max(s, 0)|, the L2 norm over the D components, or where none is positive the largest s, which is then negative.
    Raises ValueError when the handle trains no scale, or for no losses.
    """
    if handle.config.scale is None:
        raise ValueError("saliency needs scales: expected a handle patched with LofitConfig(scale=...)")
    scaled = {number: layer for number, layer in handle.layers.items() if layer.scale is not None}
    vectors = [layer.scale for layer in scaled.values()]
    sums = [torch.zeros_like(v, dtype=torch.float64) for v in vectors]
    squares = [torch.zeros_like(v, dtype=torch.float64) for v in vectors]
    count = 0
    for loss in losses:
        count += 1
        for total, square, gradient in zip(sums, squares, torch.autograd.grad(loss, vectors), strict=True):
            total += gradient
            square += gradient.double().square()
    if not count:
        raise ValueError("saliency needs at least one batch, got none")
    scores = _no_scores(handle.projections)
    for (number, layer), total, square in zip(scaled.items(), sums, squares, strict=True):
        push = ((total / count).abs() - l1) / ((square / count).sqrt() + _ADAM_EPS)
        norm, largest = push.clamp(min=0).norm(dim=1), push.amax(1)
        scores[number, layer.heads("scale")] = largest.where(largest < 0, norm).float().cpu()
    return scores


def probing_layer_scores(layer_accuracy: Tensor, head_accuracy: Tensor) -> Tensor:
    """Heads of the best layers first, and within a layer the best heads: (layers, heads) float32.

    layer_accuracy: (layers,); head_accuracy: (layers, heads), minus infinity for heads that are not there. A head's
    score is the number of layers that come after its own plus half its accuracy. So the top heads are all those of the
    best layers, and of the last layer that is needed its best heads. Of equally good layers the lower comes first.
    """
    best_first = layer_accuracy.argsort(descending=True, stable=True)
    after = torch.empty_like(head_accuracy[:, 0])
    after[best_first] = torch.arange(len(best_first) - 1, -1, -1).to(after)
    return after[:, None] + head_accuracy / 2


def select_heads(scores: Tensor, top: int | float, min_layer: int = 0) -> list[Head]:
    """The best heads as (layer, head), best first; ties go to the lower layer, then the lower head.

    scores: (layers, heads), minus infinity where a head is out of the running.
    top: a count, or a fraction of the heads in the running (rounded, at least one).
    min_layer: heads of layers below it are out of the running.
    Raises ValueError for a top out of range, more heads than there are, or a score that is not a number.
    """
    check_top(top)
    if scores.dim() != 2:
        raise ValueError(f"expected scores of shape (layers, heads), got {tuple(scores.shape)}")
    if scores.isnan().any() or scores.isposinf().any():
        raise ValueError("head scores are not finite: step 1 diverged; try a lower select_lr")
    layers = torch.arange(len(scores), device=scores.device)
    flat = scores.where((layers >= min_layer).unsqueeze(1), -math.inf).flatten()
    available = int((flat > -math.inf).sum())
    count = top if isinstance(top, int) else max(1, round(top * available))
    if count > available:
        raise ValueError(f"asked for the top {count} heads, but only {available} have a score")
    best = flat.argsort(descending=True, stable=True)[:count]
    return [divmod(int(i), scores.shape[1]) for i in best]


def read_heads(path: Path | str) -> list[Head]:
    """The heads of a heads.json, as a run writes it, or of a plain JSON list of pairs.

    Raises FileNotFoundError for no such file, ValueError for one without heads.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of heads: {path}")
    try:
        content = json.loads(path.read_text())
        return [(layer, head) for layer, head in (content["heads"] if isinstance(content, dict) else content)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} holds no heads: expected {{"heads": [[layer, head], ...]}}') from error


def jaccard(first: list[Head], second: list[Head]) -> float:
    """Overlap of two head sets: |A and B| / |A or B|, 1.0 when both are empty."""
    union = set(first) | set(second)
    return len(set(first) & set(second)) / len(union) if union else 1.0


def _norms(handle: LofitHandle, component: str) -> Tensor:
    if getattr(handle.config, component) is None:
        name = "head scores need scales" if component == "scale" else "offset norms need offsets"
        raise ValueError(f"{name}: expected a handle patched with LofitConfig({component}=...)")
    scores = _no_scores(handle.projections)
    for number, layer in handle.layers.items():
        vectors = getattr(layer, component)
        if vectors is not None:
            scores[number, layer.heads(component)] = vectors.norm(dim=1).float().cpu()
    return scores


def _no_scores(projections: list[Projection]) -> Tensor:
    return torch.full((projections[-1].layer + 1, max(p.n_heads for p in projections)), -math.inf)
