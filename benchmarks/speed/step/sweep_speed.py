"""A sweep of four runs, in one process and in several, against four runs started one after another."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.speed.cells import Options, run_python
from benchmarks.speed.step.packaged_models import MODELS, model_folder
from benchmarks.speed.step.workload import EXAMPLES, task

# two draws of everything, two learning rates of step 2: what shares a step 1 is left to the sweep to find
SEEDS, TUNE_LRS = (1, 2), (1e-2, 2e-2)
EPOCHS, TOP = 1, 0.1


def sweep_runs_per_hour(model: str, options: Options) -> dict:
    """Wall-clock of each, from the first command to the last adapter, no evaluation in any; once.

    Separate runs differ in a seed and a learning rate, which take no time: one of them is timed and counts for all.
    One training at a time has all threads. jobs: processes of the sweep that has several, one per thread as far as
    there is a step 1 for each; 1 on a GPU. speedup, speedup_jobs: separate runs over the sweep in one process, and in
    `jobs`; without an interval. Raises Absent for a model whose package is not there.
    """
    # converted before anybody's time is taken
    model_folder(model)
    examples = task(options.data).train[:EXAMPLES]
    rows = [{key: asdict(one)[key] for key in ("prompt", "completion")} for one in examples]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        # the file cache and the converted model are warm for both
        separate = _train(MODELS[model], folder, SEEDS[0], TUNE_LRS[0])
        jobs = 1 if torch.cuda.is_available() else min(torch.get_num_threads(), len(SEEDS))
        swept = {f"sweep --jobs {count}": _sweep(MODELS[model], folder, count) for count in sorted({1, jobs})}
    runs = len(SEEDS) * len(TUNE_LRS)
    total = {"separate": runs * separate, **swept}
    return {
        "seconds": {"one separate run": separate, **swept},
        "runs_per_hour": {name: 3600 * runs / seconds for name, seconds in total.items()},
        "jobs": jobs,
        "speedup": _times(total["separate"], swept["sweep --jobs 1"]),
        "speedup_jobs": _times(total["separate"], swept[f"sweep --jobs {jobs}"]),
        "runs": {"seed": SEEDS, "tune_lr": TUNE_LRS, "epochs": EPOCHS, "examples": len(rows)},
    }


def _times(separate: float, swept: float) -> dict[str, float | None]:
    return {"median": separate / swept, "low": None, "high": None}


def _train(model: str, folder: Path, seed: int, tune_lr: float) -> float:
    options = {"data": folder / "data.jsonl", "output": folder / f"train-{seed}-{tune_lr}", "seed": seed}
    options |= {"tune-lr": tune_lr, "top": TOP, "select-epochs": EPOCHS, "tune-epochs": EPOCHS}
    arguments = (str(x) for key, value in options.items() for x in (f"--{key}", value))
    return timed(options["output"], 1, "train", "--model", model, *arguments)


def _sweep(model: str, folder: Path, jobs: int) -> float:
    grid = [
        "[base]",
        f"model = {json.dumps(model)}",
        f"data = {json.dumps(str(folder / 'data.jsonl'))}",
        f"top = {TOP}",
        f"select_epochs = {EPOCHS}",
        f"tune_epochs = {EPOCHS}",
        "[grid]",
        f"seed = {list(SEEDS)}",
        f"tune_lr = {list(TUNE_LRS)}",
    ]
    (folder / "grid.toml").write_text("\n".join(grid) + "\n")
    output = folder / f"sweep-{jobs}"
    arguments = ("sweep", str(folder / "grid.toml"), "--jobs", str(jobs), "--output", str(output))
    return timed(output, len(SEEDS) * len(TUNE_LRS), *arguments)


def timed(output: Path, runs: int, *arguments: str) -> float:
    """Seconds of a `lofit-fast` command. Raises RuntimeError unless it leaves as many adapters as runs in `output`."""
    started = time.perf_counter()
    run_python("-m", "lofit_fast.cli", *arguments, "--json")
    seconds = time.perf_counter() - started
    # every run's result; an epoch's checkpoint keeps its adapter elsewhere
    left = [path for path in output.rglob("adapter/adapter_model.safetensors") if path.parents[1].name != "select"]
    if len(left) != runs:
        raise RuntimeError(f"lofit-fast {arguments[0]} left {len(left)} adapters in {output}, expected {runs}")
    return seconds
