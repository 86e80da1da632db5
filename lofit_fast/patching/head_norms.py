"""How far every head's vectors have moved: the scores of step 1."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lofit_fast.patching.architectures import Projection
from lofit_fast.patching.handle import LofitHandle


@torch.no_grad()
def head_scores(handle: LofitHandle) -> Tensor:
    """The L2 norm of every head's scale vector (arXiv:2406.01563, section 3): (layers, heads) float32 on the CPU.

    Rows are layer numbers. Heads without a scale, and layers without attention, score minus infinity.
    Raises TypeError for what is no handle, ValueError when it trains no scale, or has vectors that are not whole here.
    """
    return _norms(handle, "scale")


@torch.no_grad()
def offset_norms(handle: LofitHandle) -> Tensor:
    """The L2 norm of every head's offset vector, the bias norm: as `head_scores`, for offsets trained on all heads.

    Raises what `head_scores` raises, for offsets.
    """
    return _norms(handle, "offset")


def _norms(handle: LofitHandle, component: str) -> Tensor:
    if not isinstance(handle, LofitHandle):
        raise TypeError(f"expected the handle of a patched model, got a {type(handle).__name__}")
    if getattr(handle.config, component) is None:
        name = "head scores need scales" if component == "scale" else "offset norms need offsets"
        raise ValueError(f"{name}: expected a handle patched with LofitConfig({component}=...)")
    handle.check_vectors("score")
    scores = no_scores(handle.projections)
    for (kind, number), vectors in handle.whole_vectors().items():
        if kind == component:
            scores[number, handle.layers[number].heads(component)] = vectors.norm(dim=1).float().cpu()
    return scores


def no_scores(projections: Sequence[Projection]) -> Tensor:
    """Minus infinity for every head: (layers, heads) float32, for the scores that are known to be put in."""
    return torch.full((projections[-1].layer + 1, max(p.n_heads for p in projections)), -math.inf, dtype=torch.float32)
