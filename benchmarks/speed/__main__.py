"""`make bench` and `make bench-full`: measures what is not measured yet, cell by cell, and writes the summary.

A cell runs in a process of its own. A run that was interrupted, or that ran out of its time, goes on where it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.peers.peer import Absent
from benchmarks.speed.cell_plan import plan
from benchmarks.speed.cells import PER_ROUND, RESULTS, ROOT, Cell, Options, Store
from benchmarks.speed.ratios import write_summary
from benchmarks.speed.step.packaged_models import MODELS
from lofit_fast.cli.command import command
from lofit_fast.files import write_json

BUDGET = 75.0
out = Console()


def main(
    full: Annotated[bool, typer.Option(help="Every cell, however long it takes.")] = False,
    data: Annotated[str | None, typer.Option(help="Folder with CLUTRR; default: built-in family stories.")] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help=f"Of {', '.join(MODELS)}.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only cells with this in their name.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds, instead of each cell's own.")] = None,
    examples: Annotated[int, typer.Option(help="Examples per round of the step-level ratios.")] = PER_ROUND,
    results: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
    budget: Annotated[float, typer.Option(help="Start no cell that may end later than this many minutes.")] = BUDGET,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
    into: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure on this machine. Exits with 1 when a cell failed."""
    if (rounds is not None and rounds < 1) or examples < 1 or not budget >= 0:
        got = f"--rounds {rounds}, --examples {examples}, --budget {budget}"
        raise typer.BadParameter(f"expected rounds and examples from 1 and a budget of minutes from 0, got {got}")
    if data is not None and not Path(data).is_dir():
        raise typer.BadParameter(f"--data {data} is no folder: expected the one that holds CLUTRR")
    if unknown := sorted(set(models or ()) - set(MODELS)):
        raise typer.BadParameter(f"unknown --model {', '.join(unknown)}: expected of {', '.join(MODELS)}")
    options = Options(data and str(Path(data).resolve()), rounds, examples)
    cells = plan(full, models or tuple(MODELS))
    if cell is not None:
        write_json(into.resolve(), measured_cell(next(one for one in cells if one.name == cell), options))
        return
    planned = [one.name for one in cells]
    cells = [one for one in cells if not only or any(text in one.name for text in only)]
    if not cells:
        raise typer.BadParameter(
            f"no cell has {' or '.join(only)} in its name: expected part of one of {', '.join(planned)}"
        )
    store = Store.here(results.resolve(), options)
    how = partial(_run_cell, options, full, models or [])
    failed = run_cells(cells, store, how, float("inf") if full else budget)
    path = write_summary(results.resolve(), store, planned)
    out.print(f"wrote {path}; the report: python -m benchmarks.speed.report {results}", highlight=False)
    if failed:
        out.print(f"[red]failed:[/] {', '.join(failed)}")
        raise typer.Exit(1)


def run_cells(cells: list[Cell], store: Store, run: Callable[[Cell, Path], bool], budget: float) -> list[str]:
    """Measure what is not finished, as long as it fits in the minutes. Returns the names of cells that failed.

    A machine that takes longer for the cells so far than they were expected to take is expected to go on so.
    run: writes a cell's content to a path, and returns whether that went well.
    """
    started, failed, left = time.monotonic(), [], []
    expected = 0.0
    for number, one in enumerate(cells, start=1):
        spent = (time.monotonic() - started) / 60
        minutes = one.minutes * max(1.0, spent / expected if expected else 1.0)
        head = f"[{number}/{len(cells)}] {one.name}"
        if store.finished(one.name):
            out.print(f"{head}: finished before", highlight=False)
        elif spent + minutes > budget:
            left.append(one.name)
        else:
            out.print(f"{head}: about {minutes:.2g} min, {spent:.1f} min so far", highlight=False)
            expected += one.minutes
            if not _kept(one, store, run):
                failed.append(one.name)
    if left:
        out.print(f"left out for want of time, run again to go on: {', '.join(left)}", highlight=False)
    return failed


def _kept(cell: Cell, store: Store, run: Callable[[Cell, Path], bool]) -> bool:
    store.path(cell.name).parent.mkdir(parents=True, exist_ok=True)
    into = store.path(cell.name).with_suffix(".part")
    started = time.monotonic()
    try:
        if not run(cell, into):
            return False
        content = json.loads(into.read_text())
    finally:
        into.unlink(missing_ok=True)
    store.write(cell.name, content, time.monotonic() - started)
    if "absent" in content:
        out.print(f"  absent: {content['absent']}", highlight=False)
    return True


def _run_cell(options: Options, full: bool, models: list[str], cell: Cell, into: Path) -> bool:
    """One cell in a process of its own, whose output passes through."""
    command = [sys.executable, "-m", "benchmarks.speed", "--cell", cell.name, "--into", str(into)]
    command += ["--full"] if full else []
    # which cells there are depends on the models
    command += [word for model in models for word in ("--model", model)]
    command += ["--data", options.data] if options.data else []
    command += ["--rounds", str(options.rounds)] if options.rounds else []
    return subprocess.run([*command, "--examples", str(options.examples)], cwd=ROOT).returncode == 0


def measured_cell(cell: Cell, options: Options) -> dict:
    try:
        return cell.measure(options)
    except Absent as reason:
        return {"absent": str(reason)}


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    command(app, "--model smollm2 --budget 20", program="python -m benchmarks.speed", goes_on=True)(main)
    app()
