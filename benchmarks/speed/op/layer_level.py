"""Layer level: a decoder layer of a real model's shape, and its output projection alone, by every peer in turns."""

from __future__ import annotations

from itertools import product

import torch

from benchmarks.speed.cells import Options
from benchmarks.speed.op.operators import EVERYONE
from benchmarks.speed.op.row_times import time_layer, time_projection
from benchmarks.speed.op.timed_row import TimedRow
from benchmarks.speed.timing import ROUNDS

T = 256
TIMED_LAYERS = ("Llama-3-8B", "Gemma-7B", "Llama-2-7B")
STEPS = ("step 1", "step 2")
LEVELS = {"projection": time_projection, "layer": time_layer}


def layer_milliseconds(options: Options) -> dict:
    """Milliseconds of a forward and backward per level, model, step and peer, and the ratios to the floor.

    What cannot run here is listed with its reason.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups, rows = [], []
    for level, model, step in product(LEVELS, TIMED_LAYERS, STEPS):
        row = TimedRow(level, model, step, T)
        print(f"{level}, {model}, {step}", flush=True)
        found = LEVELS[level](row.task(device, list(EVERYONE), options.rounds or ROUNDS, float("inf")))["rows"]
        groups.append({**vars(row), "peers": {name: one for name, one in found.items() if "ms" in one}})
        for name, one in found.items():
            if why := one.get("skipped") or one.get("error"):
                rows.append({"peer": name, "step": f"{level} of {model}, {step}", "absent": why})
    return {"groups": groups, "rows": rows}
