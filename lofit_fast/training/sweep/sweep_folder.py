"""A sweep's folder: one sweep at a time, nothing in it that leads elsewhere, and the dtype that all of it is in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lofit_fast.files import given_path, read_json, writable_folder
from lofit_fast.locks import alone
from lofit_fast.models.device import DTYPES, as_device, best_device, best_dtype
from lofit_fast.training.run_folder import dtype_of_run
from lofit_fast.training.sweep.grid import Grid

RUNS, STEP1, TABLE, LOCK = "runs", "step1", "sweep.json", "sweep.lock"


@contextmanager
def opened(folder: Path | str, grid: Grid, resume: bool) -> Iterator[Path]:
    """A scope in which this sweep alone writes in a folder.

    resume: whether to go on with what is there, or to train a step 1 that runs share anew.
    Raises BlockingIOError (an OSError) naming the process and the host of a sweep that is in there, OSError where it
    cannot be written, ValueError for a link in the place of a folder that is written to.
    """
    folder = given_path(folder)
    for path in (folder / RUNS, folder / STEP1, *(folder / RUNS / run.name for run in grid.runs)):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, expected a folder of the sweep's own: a sweep writes nowhere else")
    made = not folder.exists()
    writable_folder(folder)
    try:
        with alone(folder / LOCK, f"sweep in {folder}"):
            if not resume and (folder / STEP1).exists():
                shutil.rmtree(folder / STEP1)
            yield folder
    except BaseException:
        if made:
            _remove_unused(folder)
        raise


def _remove_unused(folder: Path) -> None:
    """Remove a folder in which nothing has begun."""
    if {path.name for path in folder.iterdir()} <= {LOCK, TABLE}:
        for name in (LOCK, TABLE):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def shared_dtype(folder: Path, grid: Grid, resume: bool) -> str:
    """The dtype of every run of a sweep, whatever process it is in: the grid's, or by rule ("auto").

    A rule is asked once, and what it said is kept in the sweep's table: a sweep goes on as it was begun, wherever.
    """
    if grid.dtype != "auto":
        return grid.dtype
    if resume:
        begun = [_of_table(folder / TABLE), *(dtype_of_run(folder / RUNS / run.name) for run in grid.runs)]
        found = next((name for name in begun if isinstance(name, str) and name in DTYPES), None)
        if found is not None:
            return found
    device = best_device() if grid.device == "auto" else as_device(grid.device)
    return str(best_dtype(device)).removeprefix("torch.")


def _of_table(path: Path) -> object:
    """What a sweep's table says of its dtype; None where there is none, or it says nothing."""
    try:
        return read_json(path)["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
