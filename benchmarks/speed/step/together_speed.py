"""Four second steps in one pass each against the same four one after another: the losses, the time, and where it goes.

    python -m benchmarks.speed.step.together_speed [--model smollm2] [--runs 4] [--rounds 2] [--json FILE]

Both are sweeps on one loaded base, with heads that are given, in turns. The clock is the processor's time of the whole
process, which others on the machine do not lengthen; the wall's is beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.timing import machine
from lofit_fast.files import write_json
from lofit_fast.models.load import load_model
from lofit_fast.patching.architectures import find_projections
from lofit_fast.training.sweep.grid import Grid, parse_grid
from lofit_fast.training.sweep.run import sweep

_EXAMPLES, _BATCH, _HEADS = 12, 4, 0.03
# operations of the profile that are named
_NAMED = 8


def grid_of(model, folder: Path, runs: int) -> Grid:
    """Runs of other seeds, rates and heads, on a few short examples; one epoch."""
    draw = Random(0)
    words = ("red", "blue", "green", "tree", "stone", "river", "cloud", "bird")
    rows = [
        {
            "prompt": f"Say {' '.join(draw.choices(words, k=3 + n % 4))} backwards:",
            "completion": " " + draw.choice(words),
        }
        for n in range(_EXAMPLES)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    heads = [(p.layer, head) for p in find_projections(model) for head in range(p.n_heads)]
    listed = []
    for number in range(runs):
        path = folder / f"heads{number}.json"
        path.write_text(json.dumps(draw.sample(heads, round(_HEADS * len(heads)))))
        listed.append({"name": f"run{number}", "seed": number, "tune_lr": 0.01 * (1 + number % 2), "heads": str(path)})
    base = {"model": "loaded", "data": str(folder / "data.jsonl"), "batch_size": _BATCH, "tune_epochs": 1}
    return parse_grid({"base": base, "runs": listed})


def losses(folder: Path, grid: Grid) -> list[list[float]]:
    """Of every step, by run."""
    found = []
    for run in grid.runs:
        rows = [json.loads(line) for line in (folder / "runs" / run.name / "history.jsonl").read_text().splitlines()]
        found.append([loss for row in rows if row["stage"] == "tune" for loss in row["step_losses"]])
    return found


def measured(base: tuple, runs: int, rounds: int) -> dict[str, object]:
    """All of it, as plain data. base: (model, tokenizer). Raises ValueError where a run has failed."""
    ways = {"one by one": 1, "together": runs}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = grid_of(base[0], folder, runs)
        for number in range(rounds):
            for way, count in ways.items():
                started = time.process_time(), time.perf_counter()
                rows = sweep(grid, folder / f"{way} {number}", base=base, together=count, progress=False)
                seconds[way].append((time.process_time() - started[0], time.perf_counter() - started[1]))
                if any(row["status"] != "done" for row in rows):
                    raise ValueError(f"a run has failed {way}: {rows}")
                print(f"{way}: {seconds[way][-1][0]:.1f} s of the processor", file=sys.stderr, flush=True)
        found = [losses(folder / f"{way} 0", grid) for way in ways]
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            sweep(grid, folder / "profiled", base=base, together=runs, progress=False)
    apart = max(abs(a - b) for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True))
    cpu = {way: median(times[0] for times in taken) for way, taken in seconds.items()}
    return {
        "runs": runs,
        "steps": [len(each) for each in found[0]],
        "losses_apart": apart,
        "cpu_seconds": cpu,
        "wall_seconds": {way: median(times[1] for times in taken) for way, taken in seconds.items()},
        "runs_per_hour": {way: 3600 * runs / each for way, each in cpu.items()},
        "times_faster": cpu["one by one"] / cpu["together"],
        "profile": _shares(seen),
    }


def _shares(seen) -> dict[str, float]:
    """The operations that take longest, each with its share of the time in all."""
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:_NAMED]}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 where losses differ by more than 1e-4."""
    parser = argparse.ArgumentParser(prog="benchmarks.speed.step.together_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="an alias, a folder or a hub id (default: smollm2)")
    parser.add_argument("--runs", type=int, default=4, help="that are trained together (default: 4)")
    parser.add_argument("--rounds", type=int, default=2, help="of both ways, in turns (default: 2)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measured(load_model(options.model, dtype="float32", device="cpu"), options.runs, options.rounds)
    found = {"machine": machine(), **found}
    print(json.dumps(found, indent=2))
    if options.json:
        write_json(options.json, found)
    return 0 if found["losses_apart"] < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
