"""Many trainings on one loaded base: what they share is computed once, what is finished is not done again."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from lofit_fast.files import writable_folder, write_json, write_text
from lofit_fast.plots import sweep_chart
from lofit_fast.tasks import Task, load_task
from lofit_fast.training.grid import Grid, Run
from lofit_fast.training.recipe import fit
from lofit_fast.training.report import write_summary

# what the plot shows: the first that the runs have
_BEST = ("accuracy_after_tune", "eval_loss", "loss")
# too long for a cell
_UNSHOWN = ("chosen_heads", "recipe")
# of a run's summary, what the table shows, where it is there
_SHOWN = ("accuracy_after_select", "accuracy_after_tune", "loss", "eval_loss", "n_heads", "wall_seconds")


def sweep(
    grid: Grid,
    output_dir: Path | str,
    *,
    base: tuple[nn.Module, object] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> list[dict[str, object]]:
    """Run every training of a grid, one after the other; returns a row per run, in the order of the grid.

    base: (model, tokenizer) if they are loaded already; unpatched, and given back so.
    The model and the data are loaded once. Runs that differ only in what the choice of heads or step 2 depends on
    (top, min_layer, tune_lr, tune_epochs) share one training of step 1, kept in `step1/`: such a run is, bit for bit
    where layers are not compiled, the run that trains its own. Each run is a run folder `runs/<name>`; with resume on,
    a finished one is not run again, and an interrupted one goes on. A run that fails is recorded with its error, and
    the others go on. Writes sweep.json, sweep.csv and sweep.md after every run, so that a killed sweep has them too,
    and sweep.png.
    A row: name, the varied settings, status "done" or "failed", what `write_summary` says, seconds of the run in this
    sweep (wall_seconds) or, of a failed one, the error.
    Raises ValueError or OSError for a folder, a model or data that cannot be used.
    """
    from lofit_fast.models import load_model

    folder = writable_folder(output_dir)
    step1 = folder / "step1"
    if not resume:
        shutil.rmtree(step1, ignore_errors=True)
    model, tokenizer = load_model(grid.model, dtype=grid.dtype, device=grid.device) if base is None else base
    tasks: dict[int | None, Task] = {}
    for size in {run.train_size: None for run in grid.runs}:
        tasks[size] = load_task(grid.task, grid.data, tokenizer, train_size=size, seed=grid.data_seed)
    rows: list[dict[str, object]] = []
    with tqdm(total=len(grid.runs), desc="sweep", disable=not progress) as bar:
        for run in grid.runs:
            bar.set_postfix_str(run.name)
            options = {"engine": grid.engine, "step1_dir": step1, "resume": resume, "progress": progress}
            rows.append(_row(run, model, tokenizer, tasks[run.train_size], grid, folder / "runs" / run.name, options))
            _write_tables(folder, grid, rows)
            bar.update()
    metric = next((name for name in _BEST if any(name in row for row in rows)), None)
    if metric is not None:
        sweep_chart(rows, metric, folder / "sweep.png", f"{grid.model}, {grid.task}")
    return rows


def _row(run: Run, model, tokenizer, task: Task, grid: Grid, folder: Path, options: dict) -> dict[str, object]:
    """Train one run, or take it as it is; a failure becomes a row too."""
    row = {"name": run.name, **run.varied}
    started = time.perf_counter()
    try:
        result = fit(
            model,
            tokenizer,
            task.train,
            run.recipe,
            output_dir=folder,
            eval_data=task.validation or None,
            heads=run.heads,
            **options,
        )
    # one run's failure, of whatever kind, is no reason to lose the others
    except Exception as error:
        return {**row, "status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    try:
        summary = _summary(folder, result, grid, run, time.perf_counter() - started)
    finally:
        result.handle.unpatch()
    row |= {"status": "done", **{key: summary[key] for key in _SHOWN if summary.get(key) is not None}}
    return {**row, "chosen_heads": summary["heads"]}


def _summary(folder: Path, result, grid: Grid, run: Run, seconds: float) -> dict[str, object]:
    """The summary a run has left, or a new one."""
    path = folder / "summary.json"
    if path.is_file():
        return json.loads(path.read_text())
    last = result.history[-1] if result.history else {}
    losses = {key: last[key] for key in ("loss", "eval_loss") if key in last}
    return write_summary(
        folder, result, model=grid.model, task=grid.task, recipe=run.recipe, wall_seconds=seconds, **losses
    )


def _write_tables(folder: Path, grid: Grid, rows: list[dict[str, object]]) -> None:
    write_json(folder / "sweep.json", {"model": grid.model, "task": grid.task, "data": grid.data, "runs": rows})
    columns = _columns(rows)
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(folder / "sweep.csv", text.getvalue())
    write_text(folder / "sweep.md", as_markdown(rows))


def as_markdown(rows: list[dict[str, object]]) -> str:
    """The rows of a sweep as a Markdown table, without the lists of heads."""
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_table(rows: list[dict[str, object]], title: str):
    """The same as a table of rich, for a terminal."""
    from rich.table import Table

    columns = _columns(rows)
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def failures(rows: list[dict[str, object]]) -> str | None:
    """One line about the runs that failed, or None."""
    failed = [row for row in rows if row.get("status") == "failed"]
    if not failed:
        return None
    named = "; ".join(f"{row['name']}: {row['error']}" for row in failed)
    return f"{len(failed)} of {len(rows)} runs failed: {named}"


def _columns(rows: list[dict[str, object]]) -> list[str]:
    """Every key some row has, settings before results, in a stable order."""
    seen = {key: None for row in rows for key in row if key not in _UNSHOWN}
    results = [key for key in ("status", *_SHOWN, "error") if key in seen]
    return [key for key in seen if key not in results] + results


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
