"""Ways to choose heads, side by side: LoFiT's own, the paper's baselines, and two that cost a fraction of step 1."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from lofit_fast.config import Head, Recipe
from lofit_fast.heads import select_heads
from lofit_fast.selection.linear_probes import (
    SPLITS,
    head_activations,
    layer_probe_accuracy,
    probe_accuracy,
    probing_layer_scores,
)
from lofit_fast.tasks.contrast import contrasts
from lofit_fast.tasks.task import Task
from lofit_fast.training.choice.untrained import random_scores
from lofit_fast.training.fit import select_by_training, select_untrained
from lofit_fast.training.objectives import objective_of


@dataclass(frozen=True)
class Selection:
    """Chosen heads, best first, the (layers, heads) scores they were chosen by, and what choosing took."""

    heads: list[Head]
    scores: Tensor
    seconds: float


class Selector(Protocol):
    """One way to choose heads; the model comes back as it was."""

    def __call__(
        self,
        model: nn.Module,
        tokenizer,
        task: Task,
        recipe: Recipe,
        *,
        output_dir: Path | str,
        seed: int = 42,
        progress: bool = False,
    ) -> Selection:
        """recipe.top and min_layer say how many heads and where; `seed` stands in for the recipe's.

        output_dir: of the methods that train, which go on from an interrupted run in it.
        """


def lofit(model, tokenizer, task, recipe, *, output_dir, seed=42, progress=False, engine=None) -> Selection:
    """LoFiT's step 1: the norm of each head's trained scale. With preferences it is trained with DPO."""
    return _trained("lofit", model, tokenizer, task, recipe, output_dir, seed, progress, engine)


def early_stop(model, tokenizer, task, recipe, *, output_dir, seed=42, progress=False, engine=None) -> Selection:
    """As `lofit`, ended by `SettledHeads` when the top heads have settled."""
    return _trained("early_stop", model, tokenizer, task, recipe, output_dir, seed, progress, engine)


def bias_norm(model, tokenizer, task, recipe, *, output_dir, seed=42, progress=False, engine=None) -> Selection:
    """The norm of each head's offset, trained on all heads with the recipe of step 1."""
    return _trained("bias_norm", model, tokenizer, task, recipe, output_dir, seed, progress, engine)


def saliency(model, tokenizer, task, recipe, *, output_dir, seed=42, progress=False) -> Selection:
    """One pass over the training data, or `recipe.select_examples` of it: `saliency_scores` at scales of zero."""
    recipe = replace(recipe, seed=seed, select="saliency")
    # judged by nothing: the choice is all that is wanted
    objective = objective_of(replace(task, validation=[]))
    scores, metrics = select_untrained(model, tokenizer, objective, recipe, progress=progress)
    return Selection(select_heads(scores, recipe.top, recipe.min_layer), scores, metrics["seconds"])


def iti_probe(model, tokenizer, task, recipe, *, output_dir, seed=42, progress=False) -> Selection:
    """How well a probe on a head's output tells right answers from wrong ones: ITI's choice (arXiv:2306.03341)."""

    def scores() -> Tensor:
        z, labels, how = _probed(model, tokenizer, task, seed, progress)
        return probe_accuracy(z, labels, **how)

    return _timed(scores, recipe)


def probing_layers(model, tokenizer, task, recipe, *, output_dir, seed=42, progress=False) -> Selection:
    """All heads of the layers whose probes are best, and of the last layer needed its best-probed heads."""

    def scores() -> Tensor:
        z, labels, how = _probed(model, tokenizer, task, seed, progress)
        return probing_layer_scores(layer_probe_accuracy(z, labels, **how), probe_accuracy(z, labels, **how))

    return _timed(scores, recipe)


def _probed(model, tokenizer, task, seed: int, progress: bool) -> tuple[Tensor, Tensor, dict[str, object]]:
    """(activations, labels, how they are probed): what probes of heads and of layers have in common."""
    made = contrasts(task, seed)
    z, labels = head_activations(model, tokenizer, made, progress=progress)
    questions = [one.prompt for one in made]
    if (count := len(set(questions))) < 2:
        raise ValueError(f"a probe is judged on prompts that it was not fitted to: expected two or more, got {count}")
    return z, labels, {"splits": min(SPLITS, count), "seed": seed, "questions": questions, "progress": progress}


def random(model, tokenizer, task, recipe, *, output_dir, seed=42, progress=False) -> Selection:
    """Heads drawn from the seed: the floor of the table."""
    return _timed(lambda: random_scores(model, seed), recipe)


# those that train, and take an `Engine` as `engine`
TRAINED = ("lofit", "bias_norm", "early_stop")
# adding a way is adding a row and its test
SELECTORS: dict[str, Selector] = {
    "lofit": lofit,
    "random": random,
    "bias_norm": bias_norm,
    "iti_probe": iti_probe,
    "probing_layers": probing_layers,
    "saliency": saliency,
    "early_stop": early_stop,
}


def _timed(scores: Callable[[], Tensor], recipe: Recipe) -> Selection:
    started = time.perf_counter()
    found = scores()
    return Selection(select_heads(found, recipe.top, recipe.min_layer), found, time.perf_counter() - started)


def _trained(select: str, model, tokenizer, task, recipe, output_dir, seed, progress, engine) -> Selection:
    # how many examples a single look takes is nothing to a training
    recipe = replace(recipe, seed=seed, select=select, select_examples=None)
    objective = objective_of(replace(task, validation=[]))
    how = {"output_dir": output_dir, "progress": progress, "engine": engine}
    run = select_by_training(model, tokenizer, objective, recipe, **how)
    heads = select_heads(run.scores, recipe.top, recipe.min_layer)
    return Selection(heads, run.scores, run.metrics["select"]["seconds"])
