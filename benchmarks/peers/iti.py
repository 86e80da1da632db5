"""ITI (arXiv:2306.03341): shift the heads that know right from wrong towards right, without training.

Heads are ranked by the accuracy of a linear probe on z at the last token of right and wrong answers. A chosen head gets
the offset alpha * sigma * u: u a unit vector, from the mean of z at wrong answers to that at right ones (or the probe's
weights), sigma the deviation of z along u. That is an offset as LoFiT's, so that it is a LofitHandle: saved, merged and
exported as one. The paper edits the newest position only; an offset that can be merged edits all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lofit_fast.config import LofitConfig
from lofit_fast.heads import select_heads
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.patch import patch
from lofit_fast.selection.linear_probes import fit_probes, head_activations, probe_accuracy
from lofit_fast.tasks.contrast import Contrast

Kind = Literal["mean_shift", "probe"]


@dataclass(frozen=True)
class Directions:
    """What ITI learns of a model. accuracy: (layers, heads), of the probes. shifts: (layers, heads, D), sigma * u."""

    accuracy: Tensor
    shifts: Tensor


def find_directions(
    model: nn.Module, tokenizer, contrasts: Sequence[Contrast], *, seed: int = 42, direction: Kind = "mean_shift"
) -> Directions:
    """The costly part of `make`, which no strength and no number of heads enters. seed: of the probes' splits."""
    activations, labels = head_activations(model, tokenizer, contrasts)
    accuracy = probe_accuracy(activations, labels, seed=seed, questions=[one.prompt for one in contrasts])
    return Directions(accuracy, shifts(activations, labels, direction))


def shifts(activations: Tensor, labels: Tensor, direction: Kind = "mean_shift") -> Tensor:
    """sigma * u of every head, (layers, heads, D) float32. activations, labels: of `linear_probes.head_activations`.

    Raises ValueError for another direction than "mean_shift" or "probe".
    """
    z = activations.double()
    if direction == "mean_shift":
        towards = z[labels].mean(0) - z[~labels].mean(0)
    elif direction == "probe":
        # heads the model does not have are NaN, here and in the end
        heads = z.flatten(1, 2).transpose(0, 1)
        weights, _ = fit_probes(heads.nan_to_num(), labels)
        towards = weights.view(activations.shape[1:]) + 0 * z[0]
    else:
        raise ValueError(f"expected the direction 'mean_shift' or 'probe', got {direction!r}")
    unit = towards / towards.norm(dim=-1, keepdim=True)
    sigma = (z * unit).sum(-1).std(0, correction=0)
    return (sigma[..., None] * unit).float()


@torch.no_grad()
def steer(model: nn.Module, directions: Directions, *, top: int | float, alpha: float) -> LofitHandle:
    """Patch the model with alpha * sigma * u on the `top` heads by probe accuracy (a count, or a share of all)."""
    heads = select_heads(directions.accuracy, top)
    handle = patch(model, LofitConfig(offset=heads, init_std=0.0))
    for number, layer in handle.layers.items():
        layer.offset.copy_(alpha * directions.shifts[number, layer.heads("offset")])
    return handle


def make(
    model: nn.Module,
    tokenizer,
    contrasts: Sequence[Contrast],
    *,
    seed: int = 42,
    top: int | float = 0.05,
    alpha: float = 15.0,
    direction: Kind = "mean_shift",
) -> LofitHandle:
    """`find_directions`, then `steer`. Raises as these do; a refused model is as it was."""
    return steer(
        model, find_directions(model, tokenizer, contrasts, seed=seed, direction=direction), top=top, alpha=alpha
    )
