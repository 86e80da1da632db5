"""A sweep's folder: one grid at a time, nothing in it that leads elsewhere, and the dtype that all of it is in."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from lofit_fast.files import lasting_path, read_json, writable_folder
from lofit_fast.locks import alone
from lofit_fast.models.device import DTYPES, as_device, best_device, best_dtype
from lofit_fast.training.run_folder import dtype_of_run
from lofit_fast.training.sweep.grid import Grid
from lofit_fast.training.sweep.launched import Launch
from lofit_fast.training.sweep.meeting import meet
from lofit_fast.training.sweep.membership import CLAIMS, LOCK, MEMBERS, QUEUE, Session, digest_of_grid, member
from lofit_fast.training.sweep.worker_devices import chip_of

RUNS, STEP1, TABLE = "runs", "step1", "sweep.json"


@contextmanager
def opened(
    folder: Path | str, grid: Grid, resume: bool, launch: Launch, dtype: Callable[[Path], str]
) -> Iterator[tuple[Path, Session]]:
    """A scope in which this process is in the sweep of a folder: (folder, the sweep), which it begins or joins.

    resume: whether to go on with what is there, or to train a step 1 that runs share anew. launch: how this process was
    started. dtype: of all runs, if this process begins the sweep.
    Raises BlockingIOError (an OSError) naming the process and the host of a sweep of another grid in there, OSError
    where it cannot be written, ValueError for a link in the place of a folder that is written to, or processes that do
    not share the folder.
    """
    folder = lasting_path(folder)
    for path in (*(folder / name for name in (RUNS, STEP1, QUEUE)), *(folder / RUNS / run.name for run in grid.runs)):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, expected a folder of the sweep's own: a sweep writes nowhere else")
    made = not folder.exists()
    try:
        if launch.meets:
            meet(launch, folder, digest_of_grid(grid), chip_of(launch, grid.device))
        writable_folder(folder)
        clear = partial(shutil.rmtree, folder / STEP1, ignore_errors=True)
        with member(folder, grid, resume, launch, lambda: dtype(folder), clear) as session:
            yield folder, session
    except BaseException:
        if made:
            _remove_unused(folder)
        raise


def _remove_unused(folder: Path) -> None:
    """Remove a folder in which nothing has begun, and nobody is."""
    left = {LOCK, f"{LOCK}.owner.json", TABLE, "sweep.csv", "sweep.md", QUEUE}
    with suppress(OSError):
        if not {path.name for path in folder.iterdir()} <= left or any((folder / QUEUE).glob(f"{CLAIMS}/*")):
            return
        with alone(folder / LOCK, "remove what has not begun"):
            if any((folder / QUEUE / MEMBERS).glob("*.lock")):
                return
            shutil.rmtree(folder)


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
