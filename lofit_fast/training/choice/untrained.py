"""Scores of heads that need no training of their own: chance and gradients. Each is (layers, heads)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lofit_fast.patching.architectures import find_projections
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.head_norms import no_scores

Whole = Callable[[Sequence[Tensor]], Sequence[Tensor]]
# torch's default
_ADAM_EPS = 1e-8


def random_scores(model: nn.Module, seed: int) -> Tensor:
    """A number from [0, 1) per head, the same on every device: (layers, heads) float32, shaped as `head_scores`."""
    projections = find_projections(model)
    scores = no_scores(projections)
    drawn = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    for p in projections:
        scores[p.layer, : p.n_heads] = drawn[p.layer, : p.n_heads]
    return scores


def saliency_scores(
    handle: LofitHandle,
    losses: Iterable[Tensor],
    l1: float = 0.0,
    whole: Whole = lambda gradients: gradients,
    parts: int = 1,
) -> Tensor:
    """How far step 1's optimizer would move every head's scale, judged from the gradients at zero: (layers, heads).

    losses: one scalar per batch, each with the graph of a forward pass of the handle's model, taken one at a time; the
    scales should be zero (LofitConfig(scale="all", init_std=0)). Nothing is updated. l1: the recipe's. whole: makes
    the gradients of a part of a batch those of all of it, where the losses are of parts. parts: how many losses in a
    row are parts of one batch, and add up to its loss; the last batch may have fewer.
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
    for gradients in _of_batches(losses, vectors, whole, parts):
        count += 1
        for total, square, gradient in zip(sums, squares, gradients, strict=True):
            total += gradient
            square += gradient.double().square()
    if not count:
        raise ValueError("saliency needs at least one batch, got none")
    scores = no_scores(handle.projections)
    for (number, layer), total, square in zip(scaled.items(), sums, squares, strict=True):
        push = ((total / count).abs() - l1) / ((square / count).sqrt() + _ADAM_EPS)
        norm, largest = push.clamp(min=0).norm(dim=1), push.amax(1)
        scores[number, layer.heads("scale")] = largest.where(largest < 0, norm).float().cpu()
    return scores


def _of_batches(
    losses: Iterable[Tensor], vectors: Sequence[Tensor], whole: Whole, parts: int
) -> Iterator[Sequence[Tensor]]:
    """The gradients of each batch, from those of its parts, one graph at a time."""
    added: Sequence[Tensor] = ()
    for number, loss in enumerate(losses, start=1):
        gradients = whole(torch.autograd.grad(loss, vectors))
        added = [sum(pair) for pair in zip(added, gradients, strict=True)] if added else gradients
        if number % parts == 0:
            yield added
            added = ()
    if added:
        yield added
