"""Does our training follow the plain hook's? The same batches in the same order, every accelerator on."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from unittest import mock

import torch
from torch import Tensor, nn

import lofit_fast as lf
from benchmarks.peers.hook import HookLofit, HookStep, train_hook, vectors_of
from benchmarks.speed.step.row_settings import STOCK
from benchmarks.speed.step.whole_run import RECIPE as SHORT
from lofit_fast.config import LofitConfig
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.padding import padded, rectangle
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.training.engine import Engine, prepared

PREFIX_GB = 2.0
# two epochs of each step, since the losses of the first begin alike whatever is wrong
RECIPE = replace(SHORT, select_epochs=2, tune_epochs=2)


def loss_difference(model: nn.Module, tokenizer, examples, engine: Engine) -> dict:
    """Epoch losses of `fit`, of a hook on the very batches that fit made, and of one on them in another order.

    Heads are selected in the upper half of the layers, so that step 2 starts from the prefix cache; the hooks' step 2
    tunes the heads that fit selected. difference: the largest relative one between fit and the hook over all epochs;
    order_difference: between the two hooks.
    """
    plain, engine = copy.deepcopy(model), replace(engine, prefix_cache_gb=PREFIX_GB)
    recipe = replace(RECIPE, min_layer=len(decoder_layers(model)) // 2)
    with recorded_batches(model) as batches, tempfile.TemporaryDirectory() as folder, own_cache(folder):
        result = lf.fit(model, tokenizer, examples, recipe, output_dir=f"{folder}/run", engine=engine, progress=False)
    ours = [row["loss"] for row in result.history]
    epochs = _in_epochs(batches, RECIPE.select_epochs + RECIPE.tune_epochs)
    hook = _hook_losses(plain, epochs, result.heads)
    other = _hook_losses(plain, [epoch[::-1] for epoch in epochs], result.heads)
    return {
        "engine": asdict(engine),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "losses": {"ours": ours, "hook": hook, "hook, other order": other},
        "difference": _largest(ours, hook),
        "order_difference": _largest(other, hook),
    }


@contextmanager
def own_cache(folder: str) -> Iterator[None]:
    """A scope whose prefix cache is in that folder, and where one that stays off is an error."""
    with mock.patch.dict(os.environ, {"LOFIT_FAST_CACHE": folder}), warnings.catch_warnings():
        warnings.filterwarnings("error", message="prefix cache off")
        yield


@contextmanager
def recorded_batches(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """A scope that keeps every batch the model is trained on, as a stock Trainer would have it: padded, full labels.

    A hook on the model sees what it is called with in training mode.
    """
    batches: list[dict[str, Tensor]] = []

    def record(module: nn.Module, args: tuple, given: dict) -> None:
        if module.training:
            batches.append(as_stock(given))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield batches
    finally:
        hook.remove()


def as_stock(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of ours, padded (B, S), packed (1, T) or with a shared beginning, as a padded one with labels."""
    if "packed_rows" in batch:
        return _spread(batch)
    if "position_ids" not in batch:
        return {key: batch[key].clone() for key in ("input_ids", "attention_mask", "labels")}
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], batch["position_ids"].shape[1]], strict=True)]
    ids, labels = (batch[key][0].split(lengths) for key in ("input_ids", "labels"))
    return _padded(ids, labels)


def _spread(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The examples of a PackedCollator's batch, each with its last token again, which is its last label."""
    ids, labels = [], []
    for index, real in zip(batch["packed_rows"], batch["attention_mask"].bool(), strict=True):
        tokens, following = (batch[key][0, index[real]] for key in ("input_ids", "labels"))
        ids.append(torch.cat((tokens, following[-1:])))
        labels.append(torch.cat((torch.full_like(tokens[:1], IGNORED), following)))
    return _padded(ids, labels)


def _padded(ids: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    tokens, mask = padded([row.tolist() for row in ids], 0)
    wanted = rectangle([row.tolist() for row in labels], IGNORED)
    return {"input_ids": tokens, "attention_mask": mask, "labels": wanted}


def _in_epochs(batches: list[dict], count: int) -> list[list[dict]]:
    each = len(batches) // count
    return [batches[i * each : (i + 1) * each] for i in range(count)]


def _hook_losses(model: nn.Module, epochs: list[list[dict]], heads) -> list[float]:
    tuned = ((LofitConfig(scale="all"), HookStep(RECIPE.select_lr, RECIPE.l1)),)
    tuned += ((LofitConfig(offset=heads), HookStep(RECIPE.tune_lr)),)
    parts, losses = (epochs[: RECIPE.select_epochs], epochs[RECIPE.select_epochs :]), []
    for (config, step), part in zip(tuned, parts, strict=True):
        handle = lf.patch(model, config)
        start = vectors_of(handle)
        handle.unpatch()
        with prepared(model, STOCK):
            hook = HookLofit(model, start)
            losses += train_hook(model, hook, part, step)
            hook.remove()
    return losses


def _largest(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(first, second, strict=True))
