"""What fast settings cost in accuracy: python -m benchmarks.accuracy.fast_settings --data DIR [--dry-run]

Every cell is one JSON file; finished ones are kept, and a killed run goes on. The page is written at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lofit_fast.cli.command import command

# heavy imports happen inside the command: --help must be instant
OUTPUT = Path("docs/results/fast")
_PROGRAM = "python -m benchmarks.accuracy.fast_settings"
# training examples: enough to learn from, few enough for two slow cores
_EXAMPLES = {"mquake": 134, "clutrr": 128, "truthfulqa": 96}


def fast_settings(
    data: Annotated[str, typer.Option("--data", "-d", help="Folder of the published splits.", metavar="DIR")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the cells; the page is beside it.")
    ] = OUTPUT,
    model: Annotated[str, typer.Option("--model", "-m", help="Comma between.")] = "smollm2",
    task: Annotated[
        str, typer.Option("--task", "-t", help="Comma between: mquake, clutrr, truthfulqa.")
    ] = "mquake,clutrr",
    setting: Annotated[str | None, typer.Option(help="Comma between. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(help="How many, from 42 on.")] = 3,
    examples: Annotated[int | None, typer.Option(help="To train on. Default: by task.")] = None,
    n_eval: Annotated[int, typer.Option("--eval", help="Validation questions, at most.")] = 200,
    budget: Annotated[float | None, typer.Option(help="Minutes; no cell is started that may not end in time.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and the estimate, and stop.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the page again, and stop.")] = False,
) -> None:
    """Train every setting on every task with every seed, as far as that is not done, and write the page."""
    from benchmarks.accuracy.cell_loop import all_cells, run_cells, seconds_left
    from benchmarks.accuracy.fast_cells import SEEDS, SETTINGS, FastTuning, as_today, slots_of
    from benchmarks.accuracy.fast_execute import FastEstimate, FastExecutor
    from benchmarks.accuracy.fast_page import write_page
    from benchmarks.accuracy.paper_cells import CellFolder
    from benchmarks.accuracy.task_parts import survey

    if report_only and (budget is not None or dry_run or (dtype, device) != ("auto", "auto")):
        raise ValueError("--report-only runs nothing, and takes no --budget, --dry-run, --dtype or --device")
    if seeds < 1:
        raise ValueError(f"expected at least one seed, got {seeds}")
    tasks, names = tuple(task.split(",")), tuple(SETTINGS) if setting is None else tuple(setting.split(","))
    if unknown := sorted(set(names) - set(SETTINGS)):
        raise ValueError(f"got the settings {', '.join(unknown)}, expected some of {', '.join(SETTINGS)}")
    there = survey(tasks, data)
    sizes = {
        name: (min(there.train[name], examples or _EXAMPLES.get(name, 128)), min(there.validation[name], n_eval))
        for name in tasks
    }
    first = SEEDS[0]
    slots = slots_of(tuple(model.split(",")), sizes, tuple(range(first, first + seeds)), names)
    folder = CellFolder(output / "cells", as_today)
    tuning, estimate = FastTuning(folder), FastEstimate()
    missing = [cell for cell in all_cells(slots, folder, tuning) if folder.result(cell) is None]
    seconds = seconds_left(slots, folder, tuning, estimate)
    print(f"{len(slots)} cells, {len(missing)} to run with tuning, about {seconds / 60:.0f} minutes", file=sys.stderr)
    if dry_run:
        print("\n".join(cell.name for slot in slots for cell in slot.cells))
        return
    if not report_only:
        # trainers print their metrics
        with contextlib.redirect_stdout(io.StringIO()):
            execute = FastExecutor(data, output / "work", dtype=dtype, device=device)
            limit = None if budget is None else 60 * budget
            summary = run_cells(
                slots, folder, tuning, execute, summary=output / "summary.json", budget=limit, estimate=estimate
            )
        print(json.dumps(summary))
    chosen = f"--model {model} --task {task}" + (f" --setting {setting}" if setting else "")
    chosen += (f" --examples {examples}" if examples else "") + f" --eval {n_eval} --seeds {seeds}"
    line = f"{_PROGRAM} --data DIR {chosen}"
    print(write_page(output.with_suffix(".md"), folder, slots, line))


app = typer.Typer(pretty_exceptions_enable=False)
command(app, "--data DIR", "--data DIR --setting full,saliency-64 --dry-run", program=_PROGRAM, goes_on=True)(
    fast_settings
)

if __name__ == "__main__":
    app()
