"""The ways `fit` can choose heads, as rows: what is trained, or looked at once, and how a head is scored by it.

Adding a way is adding a row here, its settings to `config.SELECT`, its name to `plots.SCORE_NAMES`, and its test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import TrainerCallback

from lofit_fast.config import Recipe
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.head_norms import head_scores, offset_norms
from lofit_fast.training.choice.early_stop import SettledHeads
from lofit_fast.training.choice.untrained import random_scores, saliency_scores
from lofit_fast.training.shared_batches import whole_gradients

Component = Literal["scale", "offset"]


@dataclass(frozen=True)
class Trained:
    """Vectors on every head are trained with the recipe of step 1.

    component: which. score: of the trained handle, (layers, heads). callbacks: what ends the training early.
    """

    component: Component
    score: Callable[[LofitHandle], Tensor]
    callbacks: Callable[[Recipe], Sequence[TrainerCallback]] = lambda recipe: ()


@dataclass(frozen=True)
class Untrained:
    """Nothing is trained: one look at the data, or none.

    score: of a handle with scales of zero, the losses of a first epoch (made as they are asked for) and the recipe,
    (layers, heads). looks: whether it asks for losses.
    """

    score: Callable[[LofitHandle, Iterable[Tensor], Recipe], Tensor]
    looks: bool = True


Way = Trained | Untrained

WAYS: dict[str, Way] = {
    "lofit": Trained("scale", head_scores),
    "early_stop": Trained("scale", head_scores, lambda recipe: [SettledHeads(recipe.top, recipe.min_layer)]),
    "bias_norm": Trained("offset", offset_norms),
    "saliency": Untrained(
        lambda handle, losses, recipe: saliency_scores(
            handle, losses, recipe.l1, whole_gradients(handle.model), recipe.accumulation_steps
        )
    ),
    "random": Untrained(lambda handle, losses, recipe: random_scores(handle.model, recipe.seed), looks=False),
}
