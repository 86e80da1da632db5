"""What step 1 learns from: a task's completions, or its preferences. The one place that tells the two apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from lofit_fast.config import LofitConfig, Recipe
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import Encoded, encode, pad_token_id
from lofit_fast.data.lengths import GroupedByLength
from lofit_fast.evaluation.choices import check_room
from lofit_fast.patching.handle import patch
from lofit_fast.patching.layer import eval_mode
from lofit_fast.tasks.contrast import contrasts
from lofit_fast.tasks.task import Example, Task
from lofit_fast.training.fit import SCORES, Component, select_by_training

# of DPO's loss, the paper's
BETA = 0.5


@dataclass(frozen=True)
class Objective:
    """One way to learn from a task.

    step1(model, tokenizer, task, recipe, component, output_dir, callbacks, progress): step 1 alone, on a model that
    comes back as it was: (layers, heads) scores and the seconds the training took.
    losses(model, tokenizer, task, recipe, progress): the loss of each batch of one pass over the training data.
    """

    step1: Callable[..., tuple[Tensor, float]]
    losses: Callable[..., Iterator[Tensor]]


def objective_of(task: Task) -> Objective:
    """Preferences where the task has any, completions otherwise."""
    return PREFERENCES if task.preferences else COMPLETIONS


def _completions_step1(
    model: nn.Module,
    tokenizer,
    task: Task,
    recipe: Recipe,
    component: Component,
    output_dir: Path | str,
    callbacks: Sequence[TrainerCallback],
    progress: bool,
) -> tuple[Tensor, float]:
    options = {"component": component, "callbacks": callbacks, "progress": progress}
    run = select_by_training(model, tokenizer, task.train, recipe, output_dir=output_dir, **options)
    return run.scores, run.metrics["select"]["seconds"]


def _preferences_step1(
    model: nn.Module,
    tokenizer,
    task: Task,
    recipe: Recipe,
    component: Component,
    output_dir: Path | str,
    callbacks: Sequence[TrainerCallback],
    progress: bool,
) -> tuple[Tensor, float]:
    # it needs trl, which only preferences do
    from lofit_fast.training.preferences import train_dpo

    handle = patch(model, LofitConfig(**{component: "all"}, init_std=recipe.init_std, seed=recipe.seed))
    try:
        metrics = train_dpo(
            handle,
            tokenizer,
            task.preferences,
            lr=recipe.select_lr,
            epochs=recipe.select_epochs,
            beta=BETA,
            l1=recipe.l1,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            output_dir=output_dir,
            max_grad_norm=recipe.max_grad_norm,
            max_length=recipe.max_length,
            callbacks=callbacks,
            progress=progress,
        )
        return SCORES[component](handle), metrics["seconds"]
    finally:
        handle.unpatch()


def _completion_losses(model: nn.Module, tokenizer, task: Task, recipe: Recipe, progress: bool) -> Iterator[Tensor]:
    rows = [encode(tokenizer, example, recipe.max_length) for example in task.train]
    for batch in _batches(model, tokenizer, rows, recipe, progress):
        yield _loss_sum(model, batch) / batch["shift_labels"].numel()


def _preference_losses(model: nn.Module, tokenizer, task: Task, recipe: Recipe, progress: bool) -> Iterator[Tensor]:
    """DPO's loss to first order where the policy still is the reference: -beta/2 (log p(right) - log p(wrong))."""
    pairs = contrasts(task, recipe.seed)
    right, wrong = (
        [encode(tokenizer, Example(c.prompt, getattr(c, side)), recipe.max_length) for c in pairs]
        for side in ("right", "wrong")
    )
    batches = zip(
        _batches(model, tokenizer, right, recipe, progress, order_of=right),
        _batches(model, tokenizer, wrong, recipe, False, order_of=right),
        strict=True,
    )
    for better, worse in batches:
        difference = _loss_sum(model, better) - _loss_sum(model, worse)
        yield BETA / 2 * difference / len(better["input_ids"])


def _batches(
    model: nn.Module,
    tokenizer,
    rows: list[Encoded],
    recipe: Recipe,
    progress: bool,
    order_of: list[Encoded] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The first epoch's batches, in micro-batches, on the model's device. order_of: rows by whose length to batch."""
    check_room(model, [row["input_ids"] for row in rows], 0)
    lengths = [len(row["input_ids"]) for row in order_of or rows]
    order = list(GroupedByLength(lengths, recipe.batch_size, recipe.seed))
    collator = CompletionCollator(pad_token_id(tokenizer))
    size = recipe.batch_size // recipe.accumulation_steps
    device = next(model.parameters()).device
    with tqdm(total=len(rows), desc="saliency", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), size):
            batch = collator([rows[i] for i in order[start : start + size]])
            yield {key: value.to(device) for key, value in batch.items()}
            bar.update(len(batch["input_ids"]))


def _loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """-log p of all labelled tokens, summed."""
    with torch.enable_grad(), eval_mode(model):
        return model(**batch, use_cache=False).loss * batch["shift_labels"].numel()


COMPLETIONS = Objective(_completions_step1, _completion_losses)
PREFERENCES = Objective(_preferences_step1, _preference_losses)
