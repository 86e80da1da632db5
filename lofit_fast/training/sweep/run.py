"""Many trainings on one loaded base: what they share is computed once, what is finished is not done again."""

from __future__ import annotations

import csv
import io
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from lofit_fast.extras import can_draw, needing
from lofit_fast.files import write_json, write_text
from lofit_fast.patching.placement import dtype_of
from lofit_fast.plots import sweep_chart
from lofit_fast.training.sweep.grid import Grid
from lofit_fast.training.sweep.one_run import SHOWN, Runner
from lofit_fast.training.sweep.processes import rows_of_processes
from lofit_fast.training.sweep.sweep_folder import TABLE, opened, shared_dtype
from lofit_fast.training.sweep.together import TogetherRunner, check_together

# what the plot shows: the first that the runs have
_BEST = ("accuracy_after_tune", "eval_loss", "loss")
# too long for a cell
_UNSHOWN = ("chosen_heads", "recipe")


def sweep(
    grid: Grid,
    output_dir: Path | str,
    *,
    base: tuple[nn.Module, object] | None = None,
    jobs: int = 1,
    together: int = 1,
    resume: bool = True,
    progress: bool = True,
) -> list[dict[str, object]]:
    """Run every training of a grid; returns a row per run, in the order of the grid.

    base: (model, tokenizer) if they are loaded already; unpatched, and given back so. jobs: processes that train at the
    same time, each with a base of its own and its share of torch's threads; on a CPU several with one thread each train
    more runs an hour than one with several. together: runs whose second steps share each forward and backward pass, in
    one process: equal to runs one by one up to rounding, with padded batches and without what `Engine` keeps on disk.
    Each process loads the model and the data once. Runs that differ only in what their scores of heads do not depend on
    (`config.SELECT`: of LoFiT's own, top, min_layer, tune_lr and tune_epochs) share one step 1, kept in `step1/`: such
    a run is the run that trains its own, bit for bit on as many threads and where layers are not compiled. Each run is
    a run folder `runs/<name>`; with resume on, a finished one is not run again, and an interrupted one goes on. A run
    that fails, or is done and damaged, is recorded with its error, and the others go on. Writes sweep.json, sweep.csv
    and sweep.md after every run, so that a killed sweep has them too, and sweep.png. A dtype that is left to the
    machine is chosen once, and kept in sweep.json.
    A row: name, the varied settings, status "done" or "failed", what `write_summary` says, seconds of the run in this
    sweep (wall_seconds) or, of a failed one, the error.
    Raises ValueError or OSError for a folder, a model or data that cannot be used, BlockingIOError (an OSError) for a
    folder that another sweep is in, ChildProcessError (an OSError) when one of several processes dies.
    """
    if jobs < 1:
        raise ValueError(f"expected at least one job, got {jobs}")
    if jobs > 1 and base is not None:
        raise ValueError(f"a loaded base serves one process, got {jobs} jobs: leave it out, and each loads its own")
    check_together(grid, together, jobs)
    with opened(output_dir, grid, resume) as folder:
        dtype = shared_dtype(folder, grid, resume) if base is None else str(dtype_of(base[0])).removeprefix("torch.")
        grid = replace(grid, dtype=dtype)
        rows = _run_all(grid, folder, base, jobs, together, resume, progress)
        metric = next((name for name in _BEST if any(name in row for row in rows)), None)
        if metric is not None and can_draw():
            sweep_chart(rows, metric, folder / "sweep.png", f"{grid.model}, {grid.task}")
        return rows


def _run_all(
    grid: Grid, folder: Path, base, jobs: int, together: int, resume: bool, progress: bool
) -> list[dict[str, object]]:
    """Every run of a grid, in processes where there are several jobs; the tables are written after each."""
    rows: dict[int, dict[str, object]] = {}
    with tqdm(total=len(grid.runs), desc="sweep", disable=not progress) as bar:
        if together > 1:
            ended = TogetherRunner(grid, folder, base, resume=resume, progress=progress).rows(together)
        elif jobs == 1:
            runner = Runner(grid, folder, base, resume=resume, progress=progress)
            ended = ((index, runner(run)) for index, run in enumerate(grid.runs))
        else:
            ended = rows_of_processes(grid, folder, min(jobs, len(grid.runs)), resume)
        # so that it goes on in this dtype, should it be stopped before a run has ended
        if not resume or not (folder / TABLE).is_file():
            write_json(folder / TABLE, _content(grid, []))
        with closing(ended):
            for index, row in ended:
                rows[index] = row
                bar.set_postfix_str(f"{row['status']}: {row['name']}")
                bar.update()
                _write_tables(folder, grid, _in_order(rows))
    return _in_order(rows)


def _in_order(rows: dict[int, dict[str, object]]) -> list[dict[str, object]]:
    return [rows[index] for index in sorted(rows)]


def _write_tables(folder: Path, grid: Grid, rows: list[dict[str, object]]) -> None:
    write_json(folder / TABLE, _content(grid, rows))
    columns = _columns(rows)
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(folder / "sweep.csv", text.getvalue())
    write_text(folder / "sweep.md", as_markdown(rows))


def _content(grid: Grid, rows: list[dict[str, object]]) -> dict[str, object]:
    return {"model": grid.model, "task": grid.task, "data": grid.data, "dtype": grid.dtype, "runs": rows}


def as_markdown(rows: list[dict[str, object]]) -> str:
    """The rows of a sweep as a Markdown table, without the lists of heads."""
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_table(rows: list[dict[str, object]], title: str):
    """The same as a table of rich, for a terminal."""
    with needing("rich", "train", "a table for a terminal"):
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
    results = [key for key in ("status", *SHOWN, "error") if key in seen]
    return [key for key in seen if key not in results] + results


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
