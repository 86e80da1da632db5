"""The loop over cells: finished ones are skipped, failed ones recorded, none is started that may not end in time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.accuracy.estimate import Estimate
from benchmarks.accuracy.experiments import Slot
from benchmarks.accuracy.paper_cells import Cell, CellFolder, main_metric
from benchmarks.accuracy.tuning import Tuning, settled_so_far
from lofit_fast.files import write_json

# a cell may take that much longer than estimated and still end within the budget
MARGIN = 1.3

Execute = Callable[[Cell], dict]


def run_cells(
    slots: Sequence[Slot],
    folder: CellFolder,
    tuning: Tuning,
    execute: Execute,
    *,
    summary: Path,
    budget: float | None = None,
    progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
    estimate: Estimate | None = None,
) -> dict[str, object]:
    """Run what is missing, model by model and in the order of the slots; each cell's tuning runs before it.

    execute: cell -> what its file holds. budget: seconds, after which nothing is running; None for no limit.
    summary: a JSON file of what this run has done, replaced after every cell. estimate: of seconds, which it corrects.
    Returns the summary: finished (cells of the whole plan with a result, under the best settings so far), run, failed
    (name and error of each; tried again by the next run), late (left for want of time), waiting (their tuning is not
    finished), seconds.
    """
    started, estimate = clock(), estimate or Estimate()
    counts: dict[str, object] = {"run": 0, "failed": [], "late": 0}
    wanted = _by_model(slots)
    tried: set[Cell] = set()
    for cell in _missing(wanted, folder, tuning, tried):
        tried.add(cell)
        expected = estimate.seconds(cell)
        if budget is not None and clock() - started + MARGIN * expected > budget:
            counts["late"] += 1
            continue
        began = clock()
        try:
            result = execute(cell)
            folder.write(cell, result)
        # one cell's failure, of whatever kind, is no reason to lose the others
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            counts["failed"].append({"cell": cell.name, "error": message[:500]})
        else:
            message = _outcome(result)
            counts["run"] += 1
            estimate.learn(cell, clock() - began)
        if progress:
            left = seconds_left(slots, folder, tuning, estimate, tried)
            took = f"{clock() - began:.0f} s"
            print(f"{cell.name}: {message}, {took}; about {left / 60:.0f} min left", file=sys.stderr)
        write_json(summary, _summary(counts, wanted, folder, tuning, clock() - started))
    report = _summary(counts, wanted, folder, tuning, clock() - started)
    write_json(summary, report)
    return report


def seconds_left(
    slots: Sequence[Slot], folder: CellFolder, tuning: Tuning, estimate: Estimate, tried: set[Cell] | None = None
) -> float:
    """Of all cells that are not there yet, tuning runs included."""
    tried = tried or set()
    known = sum(estimate.seconds(cell) for cell in all_cells(slots, folder, tuning) - tried if not folder.result(cell))
    # what a search will try is not known before it has come there, only how often
    searches = {tuple(tuning.runs(cell)) for slot in slots for cell in slot.cells}
    return known + sum(tuning.unknown(runs) * estimate.seconds(runs[0]) for runs in searches if runs)


def all_cells(slots: Sequence[Slot], folder: CellFolder, tuning: Tuning) -> set[Cell]:
    """Every cell of the plan and every tuning run; those whose tuning is not finished stand as they are."""
    cells = {cell for slot in slots for cell in slot.cells}
    return {tuning.settled(cell) or cell for cell in cells} | {run for cell in cells for run in tuning.runs(cell)}


def _by_model(slots: Sequence[Slot]) -> list[Cell]:
    """The slots' cells, each once, all of one model before those of the next."""
    cells = dict.fromkeys(cell for slot in slots for cell in slot.cells)
    models = list(dict.fromkeys(cell.model for cell in cells))
    return sorted(cells, key=lambda cell: models.index(cell.model))


def _missing(wanted: Sequence[Cell], folder: CellFolder, tuning: Tuning, tried: set[Cell]):
    for cell in wanted:
        # what a search tries next follows from what is finished
        while pending := [run for run in tuning.runs(cell) if run not in tried and folder.result(run) is None]:
            yield pending[0]
        settled = tuning.settled(cell)
        if settled is not None and settled not in tried and folder.result(settled) is None:
            yield settled


def _summary(counts, wanted, folder: CellFolder, tuning: Tuning, seconds: float) -> dict[str, object]:
    so_far = settled_so_far(wanted, tuning)
    finished = sum(folder.result(cell) is not None for cell in so_far)
    waiting = sum(tuning.settled(cell) is None for cell in so_far)
    return {"cells": len(so_far), "finished": finished, "waiting": waiting, **counts, "seconds": seconds}


def _outcome(result: dict) -> str:
    name = main_metric(result["metrics"])
    return f"{name.replace('_', ' ')} {100 * result['metrics'][name]:.1f} %"
