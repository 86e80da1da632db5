"""A whole run on as many examples as the paper's with `--fast`, beside hooks and LoRA as their users run them.

A stock loop has nothing but steps, and its steps are alike: the seconds of its run are counted up from a part of it,
whole epochs over some of the examples, in proportion to the tokens. The parts are timed before and after our run. Ours
is timed whole: selecting, compiling, filling caches and saving are in it. Each has a process of its own, in which the
model is loaded before the clock starts.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from unittest import mock

from torch import nn

import lofit_fast as lf
from benchmarks.speed.step.whole_run import RECIPE, RUNS
from benchmarks.speed.step.workload import Workload, real_tokens
from lofit_fast.config import RECIPES, fast_settings
from lofit_fast.tasks import Example

# the paper's: examples, and epochs of each step
EXAMPLES, EPOCHS = 300, 5
# peer -> epochs of a whole run of it: LoFiT's two steps, and LoRA as long as one of them
PEERS = {"hook": 2 * EPOCHS, "lora_all": EPOCHS}


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
    parts: dict[str, list[float]] = {peer: [] for peer in PEERS}

    def timed(run: Callable, *arguments) -> dict:
        if not processes:
            return run(*arguments)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(run, *arguments).result()

    def time_parts() -> None:
        for peer in PEERS:
            parts[peer].append(timed(_part, peer, first)["seconds"])

    time_parts()
    recipe = _recipe(positions, epochs)
    ours = timed(_ours, loaded, recipe)
    time_parts()
    done = RECIPE.select_epochs + RECIPE.tune_epochs
    whole = {peer: [s / share * PEERS[peer] / done for s in parts[peer]] for peer in PEERS}
    return {
        "ours": ours,
        "parts": {"examples": part, "epochs": done, "share_of_tokens": share, "seconds": parts},
        "whole_run_seconds": whole,
        "ratios": {peer: _plain(seconds, ours["seconds"]) for peer, seconds in whole.items()},
        "workload": loaded.work.describe(),
        "epochs": {"ours": recipe.tune_epochs, **PEERS},
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
    model, tokenizer = loaded.load()
    started = time.perf_counter()
    RUNS[peer](model, tokenizer, loaded.examples, loaded.work)
    return {"seconds": time.perf_counter() - started}


def _plain(whole: list[float], ours: float) -> dict:
    """The ratio of the mean of the two parts, and of each."""
    made = sorted(seconds / ours for seconds in whole)
    return {"median": sum(made) / len(made), "low": made[0], "high": made[-1]}
