"""The rows of a sweep as files, as Markdown, and for a terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lofit_fast.extras import needing
from lofit_fast.files import as_json, write_json, write_text
from lofit_fast.training.sweep.grid import Grid
from lofit_fast.training.sweep.one_run import SHOWN
from lofit_fast.training.sweep.sweep_folder import TABLE

# too long for a cell
_UNSHOWN = ("chosen_heads", "recipe")


def write_tables(folder: Path, grid: Grid, rows: list[dict[str, object]]) -> None:
    """Write sweep.json, sweep.csv and sweep.md of the rows so far, each whole or not at all."""
    write_json(folder / TABLE, as_json(_content(grid, rows)))
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
