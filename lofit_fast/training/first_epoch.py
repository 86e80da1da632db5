"""The batches of a first epoch and their losses, for methods that look at gradients without training: saliency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lofit_fast.config import Recipe
from lofit_fast.data.collate import Batch, n_labels, on_device
from lofit_fast.data.encode import Encoded, pad_token_id
from lofit_fast.data.lengths import GroupedByLength
from lofit_fast.evaluation.choices import check_room
from lofit_fast.models.head_trial import chunked_losses, longest_head
from lofit_fast.models.logit_rows import SCOPED, logit_rows
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.placement import device_of
from lofit_fast.tasks.task import draw
from lofit_fast.training.engine import Engine, collator_of
from lofit_fast.training.shared_batches import SHARE, Share, ShareCollator, n_labels_of, sharers


def looked_at(n_examples: int, recipe: Recipe) -> list[int]:
    """Indices of the examples that a single look takes, ascending: select_examples of them, drawn by the seed."""
    asked = n_examples if recipe.select_examples is None else min(recipe.select_examples, n_examples)
    return draw(n_examples, asked, recipe.seed)


def first_epoch(
    model: nn.Module,
    tokenizer,
    rows: Sequence[Encoded],
    recipe: Recipe,
    engine: Engine,
    progress: bool,
    order_of: Sequence[Encoded] | None = None,
    collate: Callable[[Sequence[Encoded]], Batch] | None = None,
) -> Iterator[tuple[Batch, Share]]:
    """The first epoch's batches, in micro-batches, on the model's device, as an engine lays them out.

    Each is what this process has of it, of several in a run, and how much that is of its optimizer step: the rows and
    labels of a share are those of all micro-batches of the step. order_of: rows by whose length to batch.
    collate: makes a batch of rows; default as the engine lays them out.
    """
    check_room(model, [row["input_ids"] for row in rows], 0)
    # of one length, their order is a plain shuffle
    lengths = [len(row["input_ids"]) if engine.group_by_length else 1 for row in order_of or rows]
    order = list(GroupedByLength(lengths, recipe.batch_size, recipe.seed))
    if collate is None:
        collate = collator_of(engine, pad_token_id(tokenizer), logit_rows(model, SCOPED))
    collator = ShareCollator(collate, n_labels_of, cut=sharers(model) > 1)
    size = recipe.batch_size // recipe.accumulation_steps
    device = device_of(model)
    with tqdm(total=len(rows), desc="saliency", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), size):
            taken = order[start : start + size]
            batch = collator([rows[i] for i in taken])
            begin = start - start % recipe.batch_size
            step = order[begin : begin + recipe.batch_size]
            whole = {"rows": len(step), "labels": sum(n_labels_of(rows[i]) for i in step)}
            yield on_device(batch, device), replace(batch.pop(SHARE), **whole)
            bar.update(len(taken))


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of all labelled tokens, summed."""
    head = longest_head(model, [{"labels": row.tolist()} for row in batch["labels"]], len(batch["labels"]))
    with torch.enable_grad(), eval_mode(model), selecting_rows(model), chunked_losses(model, head):
        # a packed batch says it too
        return model(**{**batch, "use_cache": False}).loss * n_labels(batch)
