"""Times one row: every peer on one projection, or on one decoder layer, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.speed.op.clock import Timed, input_sets, milliseconds_in_turns
from benchmarks.speed.op.decoder import DecoderLayer
from benchmarks.speed.op.operators import EVERYONE, Operator, projection, step
from benchmarks.speed.timing import ratio
from lofit_kernels.shapes import SHAPES

# what is run in a row: name -> one step on input set number i
Runs = dict[str, Callable[[int], object]]


def time_projection(task: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of one projection by every peer of the task."""
    shape, dtype, device = SHAPES[task["model"]], getattr(torch, task["dtype"]), task["device"]
    first = projection(task["setting"], shape, task["T"], dtype, device)
    one = sum(x.numel() * x.element_size() for x in (first.z, first.weight, first.grad))
    sets = [first] + [
        projection(task["setting"], shape, task["T"], dtype, device, seed) for seed in range(1, input_sets(one, device))
    ]

    def run(operator: Operator) -> Callable[[int], object]:
        return lambda i: step(operator, sets[i % len(sets)])

    return _rows(task, {name: run(EVERYONE[name]) for name in task["peers"]}, first.z.numel())


def time_layer(task: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of a decoder layer with every peer of the task as its output projection."""
    shape, dtype, device = SHAPES[task["model"]], getattr(torch, task["dtype"]), task["device"]
    layer = DecoderLayer(shape, task["T"], dtype, device)
    sets = [layer.inputs() for _ in range(2)]
    # of its tensors a layer uses the weight and the vectors only
    p = projection(task["setting"], shape, 1, dtype, device)
    whole = projection(task["setting"], shape, task["T"], dtype, device)

    def run(operator: Operator) -> Callable[[int], object]:
        def one(i: int) -> object:
            x, grad = sets[i % len(sets)]
            y = layer(x, lambda z: operator.forward(z, p))
            return torch.autograd.grad(y, [x, *operator.trained(p)], grad)

        return one

    runs: Runs = {name: run(EVERYONE[name]) for name in task["peers"]}
    if "floor" in runs:
        # how much of the layer the bare projection is: what an adapter's slow-down of it is diluted by
        runs["the projection alone"] = lambda i: step(EVERYONE["floor"], whole)
    return _rows(task, runs, whole.z.numel())


def _rows(task: dict[str, Any], runs: Runs, elements: int) -> dict[str, Any]:
    rows, ready, device = {}, {}, task["device"]
    # what was compiled for another shape would be made dynamic, or after too many of them not be compiled at all
    torch._dynamo.reset()
    missing, now = _missing(task), task.get("now", _unheard)
    for name, run in runs.items():
        if name in missing:
            rows[name] = {"skipped": missing[name]}
            continue
        now(name)
        try:
            rows[name] = {"peak_bytes": _first_steps(run, device)}
            ready[name] = run
        except torch.OutOfMemoryError:
            rows[name] = {"skipped": "out of memory"}
            torch.cuda.empty_cache()
        except Exception as failure:
            rows[name] = {"error": f"{type(failure).__name__}: {str(failure).strip()[:400]}"}
            if device == "cuda" and _broken():
                return {"rows": rows, "broken_by": name}
    timed = milliseconds_in_turns(ready, task["rounds"], task["seconds"], device, now)
    for name, found in timed.items():
        rows[name] |= _summary(found, timed.get("floor"))
    return {"rows": rows, "elements": elements}


def _unheard(name: str) -> None:
    """Who is at work now, where nobody asks."""


def _missing(task: dict[str, Any]) -> dict[str, str]:
    p = projection(task["setting"], SHAPES[task["model"]], 1, getattr(torch, task["dtype"]), task["device"])
    reasons = {name: EVERYONE[name].missing(p) for name in task["peers"]}
    return {name: why for name, why in reasons.items() if why}


def _first_steps(run: Callable[[int], object], device: str) -> int | None:
    """Compiles and warms up. Returns the peak of memory a step needs above what was there, on a GPU."""
    run(0)
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(1)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _broken() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _summary(found: Timed, floor: Timed | None) -> dict[str, Any]:
    ordered = sorted(found.device_ms)
    quarter = len(ordered) // 4
    row: dict[str, Any] = {
        "ms": statistics.median(ordered),
        "quartiles_ms": [ordered[quarter], ordered[-1 - quarter]],
        "host_ms": statistics.median(found.host_ms),
        "rounds": len(ordered),
    }
    if floor is not None:
        row["vs_floor"] = vars(ratio(found.device_ms, floor.device_ms))
    return row
