"""A whole run on as many examples as the paper's with `--fast`, beside hooks and LoRA as their users run them.

A stock loop has nothing but steps, and its steps are alike: the seconds of its run are counted up from the median step
of a part of it, whole epochs over some of the examples, in proportion to the tokens. A run on one batch precedes, so
that what a process does once is not counted many times. The parts are timed before and after our run. Ours is timed
whole: selecting, compiling, filling caches and saving are in it. Each has a process of its own, in which the
model is loaded before the clock starts.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from unittest import mock

from torch import nn

import lofit_fast as lf
from benchmarks.speed.step.whole_run import RECIPE, RUNS
from benchmarks.speed.step.workload import BATCH, Workload, real_tokens
from benchmarks.speed.timing import ratio
from lofit_fast.config import RECIPES, fast_settings
from lofit_fast.tasks import Example

# the paper's: examples, and epochs of each step
EXAMPLES, EPOCHS = 300, 5
# peer -> epochs of a whole run of it, by stage: LoFiT's two steps, and LoRA as long as one of them
PEERS = {"hook": {"select": EPOCHS, "tune": EPOCHS}, "lora_all": {"tune": EPOCHS}}


@dataclass(frozen=True)
class Loaded:
    """What a process works with. load: () -> (model, tokenizer); can be pickled."""

    load: Callable[[], tuple[nn.Module, object]]
    examples: list[Example]
    work: Workload


def fast_run_seconds(
    loaded: Loaded, *, part: int, positions: str, epochs: int | None = None, processes: bool = True
) -> dict:
    """Seconds of our whole run and of the peers' parts, and the ratios of whole runs, as plain data.

    part: how many of the examples the peers are timed on. positions: where our vectors act, "all" or "answer". epochs:
    of our step 2; default the preset's. processes: False runs all of it here.
    """
    first = replace(loaded, examples=loaded.examples[:part], work=replace(loaded.work, rows=loaded.work.rows[:part]))
    share = real_tokens(first.work.rows) / real_tokens(loaded.work.rows)
    parts: dict[str, list[dict]] = {peer: [] for peer in PEERS}

    def timed(run: Callable, *arguments) -> dict:
        if not processes:
            return run(*arguments)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(run, *arguments).result()

    def time_parts() -> None:
        for peer in PEERS:
            parts[peer].append(timed(_part, peer, first))

    time_parts()
    recipe = _recipe(positions, epochs)
    ours = timed(_ours, loaded, recipe)
    time_parts()
    done = RECIPE.select_epochs + RECIPE.tune_epochs
    batches = -(-len(first.work.rows) // BATCH)
    whole = {peer: [_whole(peer, one["step_seconds"], batches) / share for one in parts[peer]] for peer in PEERS}
    kept = {name: {peer: [one[name] for one in parts[peer]] for peer in PEERS} for name in ("seconds", "step_seconds")}
    return {
        "ours": ours,
        "parts": {"examples": part, "epochs": done, "share_of_tokens": share, **kept},
        "whole_run_seconds": whole,
        "ratios": {peer: asdict(ratio(s, [ours["seconds"]] * len(s))) for peer, s in whole.items()},
        "workload": loaded.work.describe(),
        "epochs": {"ours": recipe.tune_epochs, **{peer: sum(of.values()) for peer, of in PEERS.items()}},
        "recipe": asdict(recipe),
    }


def _recipe(positions: str, epochs: int | None) -> lf.Recipe:
    """What `lofit-fast train --fast --positions ...` has; at all positions the heads and epochs of the hook's run."""
    said: dict[str, object] = {"positions": positions}
    if positions == "all":
        said |= {"top": RECIPE.top, "tune_epochs": EPOCHS}
    if epochs is not None:
        said["tune_epochs"] = epochs
    return lf.Recipe(**fast_settings(said, RECIPES["clutrr"]))


def _ours(loaded: Loaded, recipe: lf.Recipe) -> dict:
    model, tokenizer = loaded.load()
    how = {"engine": lf.Engine.fast(), "progress": False}
    # prompts that an earlier run has kept would be a part of the run that is not timed
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"LOFIT_FAST_CACHE": f"{folder}/cache"}):
        started = time.perf_counter()
        result = lf.fit(model, tokenizer, loaded.examples, recipe, output_dir=f"{folder}/run", **how)
        seconds = time.perf_counter() - started
    losses = [row["loss"] for row in result.history if row["stage"] == "tune"]
    return {"seconds": seconds, "stages": result.metrics, "losses": losses}


def _part(peer: str, loaded: Loaded) -> dict:
    # untimed, in a model of its own, which it changes
    RUNS[peer](*loaded.load(), loaded.examples[:BATCH], replace(loaded.work, rows=loaded.work.rows[:BATCH]))
    model, tokenizer = loaded.load()
    started = time.perf_counter()
    report = RUNS[peer](model, tokenizer, loaded.examples, loaded.work)
    return {"seconds": time.perf_counter() - started, "step_seconds": report["step_seconds"]}


def _whole(peer: str, steps: dict[str, list[float]], batches: int) -> float:
    """Seconds of a whole run over the part's examples: by stage, its epochs of so many of the median step."""
    return sum(epochs * batches * statistics.median(steps[stage]) for stage, epochs in PEERS[peer].items())
