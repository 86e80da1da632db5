"""Whole runs, from a loaded model to a tuned adapter: probing, compiling where it pays, selecting, saving."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

import lofit_fast as lf
from benchmarks.peers.hook import HookLofit, HookStep, train_hook
from benchmarks.peers.peer import AS_RUN
from benchmarks.peers.table import TIMED
from benchmarks.speed.step.row_settings import STOCK
from benchmarks.speed.step.steps import vectors
from benchmarks.speed.step.workload import BATCH, Workload, stock_batches
from lofit_fast.config import RECIPES, Recipe
from lofit_fast.training.engine import prepared

RECIPE = Recipe(**RECIPES["clutrr"], top=0.1, select_epochs=1, tune_epochs=1)


def ours(model: nn.Module, tokenizer, examples, work: Workload) -> dict:
    """`fit`, both steps, with the defaults."""
    with tempfile.TemporaryDirectory() as folder:
        result = lf.fit(model, tokenizer, examples, RECIPE, output_dir=folder, progress=False)
    losses = {stage: [r["loss"] for r in result.history if r["stage"] == stage] for stage in ("select", "tune")}
    return {"losses": losses, "stages": result.metrics}


def hook(model: nn.Module, tokenizer, examples, work: Workload) -> dict:
    """Hooks in a plain loop, both steps."""
    epochs = shuffled_epochs(work, RECIPE.select_epochs + RECIPE.tune_epochs)
    seconds: dict[str, list[float]] = {"select": [], "tune": []}
    with prepared(model, STOCK):
        first = HookLofit(model, vectors(model, "step 1"))
        step = HookStep(RECIPE.select_lr, RECIPE.l1)
        select = train_hook(model, first, epochs[: RECIPE.select_epochs], step, seconds["select"])
        scores = torch.stack([rows.detach().norm(dim=1) for _, rows in sorted(first.parameters.items())])
        first.remove()
        handle = lf.patch(model, lf.LofitConfig(offset=lf.select_heads(scores, RECIPE.top)))
        start = {(n, "offset"): (layer.heads("offset"), layer.offset.detach()) for n, layer in handle.layers.items()}
        handle.unpatch()
        step, rest = HookStep(RECIPE.tune_lr), epochs[RECIPE.select_epochs :]
        tune = train_hook(model, HookLofit(model, start), rest, step, seconds["tune"])
    return {"losses": {"select": select, "tune": tune}, "step_seconds": seconds}


def lora_all(model: nn.Module, tokenizer, examples, work: Workload) -> dict:
    """LoRA on all linears in a plain loop, as many examples seen."""
    epochs = shuffled_epochs(work, RECIPE.select_epochs + RECIPE.tune_epochs)
    attached = TIMED["lora_all"].attach(model, {})
    seconds: list[float] = []
    with prepared(attached.model, STOCK):
        losses = train_hook(attached.model, _Parameters(attached.parameters), epochs, HookStep(lr=2e-4), seconds)
    return {"losses": {"tune": losses}, "step_seconds": {"tune": seconds}}


RUNS: dict[str, Callable[..., dict]] = {"ours": ours, "hook": hook, "lora_all": lora_all}


def whole_run_seconds(peer: str, model: nn.Module, tokenizer, examples, work: Workload) -> dict:
    """Seconds and epoch losses of one peer's run."""
    started = time.perf_counter()
    report = RUNS[peer](model, tokenizer, examples, work)
    seconds = time.perf_counter() - started
    epochs = RECIPE.select_epochs + RECIPE.tune_epochs
    about = {"peer": peer, "setting": "whole" if peer == "ours" else AS_RUN, "epochs": epochs}
    return {**about, "seconds": seconds, "workload": work.describe(), **report}


def shuffled_epochs(work: Workload, count: int, seed: int = 0) -> list[list[dict]]:
    """Stock batches of all examples, in another random order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(work.rows), generator=generator).tolist() for _ in range(count)]
    return [stock_batches([work.rows[i] for i in order], work.pad) for order in orders]


class _Parameters:
    """What `train_hook` needs to know of a hook, for parameters without an L1 term."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = {(number, "other"): parameter for number, parameter in enumerate(parameters)}


assert RECIPE.batch_size == BATCH
