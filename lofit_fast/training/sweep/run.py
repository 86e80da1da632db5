"""Many trainings on one loaded base: what they share is computed once, what is finished is not done again."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from lofit_fast.extras import can_draw
from lofit_fast.patching.placement import dtype_of
from lofit_fast.plots import sweep_chart
from lofit_fast.random_states import same_random_numbers
from lofit_fast.training.sweep.grid import Grid
from lofit_fast.training.sweep.launched import Launch, launched
from lofit_fast.training.sweep.membership import Session, sole
from lofit_fast.training.sweep.one_run import Runner
from lofit_fast.training.sweep.processes import work_in_processes
from lofit_fast.training.sweep.run_queue import Row, RunQueue
from lofit_fast.training.sweep.sweep_folder import RUNS, TABLE, opened, shared_dtype
from lofit_fast.training.sweep.sweep_tables import write_tables
from lofit_fast.training.sweep.together import TogetherRunner, check_together
from lofit_fast.training.sweep.worker_devices import launched_device, worker_devices

# what the plot shows: the first that the runs have
_BEST = ("accuracy_after_tune", "eval_loss", "loss")
Base = tuple[nn.Module, object]


@same_random_numbers()
def sweep(
    grid: Grid,
    output_dir: Path | str,
    *,
    base: Base | None = None,
    jobs: int = 1,
    devices: str | Sequence[str | int] | None = None,
    together: int = 1,
    resume: bool = True,
    progress: bool = True,
) -> list[dict[str, object]]:
    """Run every training of a grid; returns a row per run, in the order of the grid.

    base: (model, tokenizer) if they are loaded already; unpatched, and given back so. jobs: processes that train at the
    same time, each with a base of its own and its share of torch's threads; on a CPU several with one thread each train
    more runs an hour than one with several. devices: "0,1,2" or ("cuda:0", "cpu"), say: such a process for each, which
    sees that device alone; one that is named twice has two. together: runs whose second steps share each forward and
    backward pass of a process: equal to runs one by one up to rounding, with padded batches and without what `Engine`
    keeps on disk.
    Each process loads the model and the data once. Runs that differ only in what their scores of heads do not depend on
    (`config.SELECT`: of LoFiT's own, top, min_layer, and what begins with tune_; of "early_stop" only the latter) share
    one step 1, kept in `step1/`:
    such a run is the run that trains its own, bit for bit on as many threads and where layers are not compiled. Each
    run is a run folder `runs/<name>`; with resume on, a finished one is not run again, and an interrupted one goes on.
    A run that fails, or is done and damaged, is recorded with its error, and the others go on. Writes sweep.json,
    sweep.csv and sweep.md after every run, so that a killed sweep has them too, and sweep.png. A dtype that is left to
    the machine is chosen once, and kept in sweep.json.
    The folder is the queue: several calls with one grid and folder, in processes on any hosts that share it, train each
    run once among them, and each returns all rows. A run whose process dies is taken up by the next that is free, from
    its checkpoint; one in which three have died is a failed row. Under torchrun or srun each process is one of these.
    A row: name, the varied settings, status "done" or "failed", what `write_summary` says, seconds of the run in this
    sweep (wall_seconds) or, of a failed one, the error.
    Raises ValueError or OSError for a folder, a model or data that cannot be used, devices that are not here or more of
    them than runs, BlockingIOError (an OSError) for a folder that a sweep of another grid is in, ChildProcessError (an
    OSError) when all of several processes die.
    """
    launch = launched()
    workers = checked_workers(grid, base, jobs, devices, together, launch)
    # the first stands for all: they are of one kind
    asked = grid if workers is None or workers[0] is None else replace(grid, device=workers[0])
    own = None if base is None else str(dtype_of(base[0])).removeprefix("torch.")
    with opened(output_dir, grid, resume, launch, lambda folder: own or shared_dtype(folder, asked, resume)) as (
        folder,
        session,
    ):
        if own not in (None, session.dtype):
            raise ValueError(f"the sweep in {folder} is in {session.dtype}: expected such a base, got one in {own}")
        if session.others:
            print(f"joining the sweep in {folder}, where {', '.join(session.others)} is at work", file=sys.stderr)
        for device, times in Counter(workers or ()).items():
            if times > 1 and device is not None:
                print(f"{times} processes share {device}", file=sys.stderr)
        grid = replace(grid, dtype=session.dtype)
        rows = _run_all(grid, folder, session, base, workers, together, progress)
        with sole(folder):
            write_tables(folder, grid, rows)
            metric = next((name for name in _BEST if any(name in row for row in rows)), None)
            if metric is not None and can_draw():
                sweep_chart(rows, metric, folder / "sweep.png", f"{grid.model}, {grid.task}")
        return rows


def checked_workers(
    grid: Grid,
    base: Base | None,
    jobs: int,
    devices: str | Sequence[str | int] | None,
    together: int,
    launch: Launch,
) -> tuple[str | None, ...] | None:
    """`workers_of`, after a look at `together`: all of how a sweep is run that can be refused before it begins."""
    check_together(grid, together, jobs)
    return workers_of(grid, base, jobs, devices, launch)


def workers_of(
    grid: Grid, base: Base | None, jobs: int, devices: str | Sequence[str | int] | None, launch: Launch
) -> tuple[str | None, ...] | None:
    """The device of each worker process, None for the grid's; None where the calling process trains itself.

    Raises ValueError for what does not go together, and for more workers than runs.
    """
    if jobs < 1:
        raise ValueError(f"expected at least one job, got {jobs}")
    several = [what for what, given in (("jobs", jobs > 1), ("devices", devices is not None)) if given]
    several += ["processes of one launch"] * (launch.count > 1)
    if several and base is not None:
        raise ValueError(f"a loaded base serves one process, got {jobs} jobs: leave it out, and each loads its own")
    if launch.local_count == 1 and several[1:] == ["processes of one launch"]:
        # one process per machine, which has workers of its own
        several = several[:1]
    if len(several) > 1:
        raise ValueError(
            f"expected one of jobs, devices and several processes on a machine, got {' and '.join(several)}"
        )
    runs = len(grid.runs)
    if launch.count > runs:
        raise ValueError(f"got {launch.count} processes for {runs} runs: expected as many runs at least")
    if devices is not None:
        if grid.device != "auto":
            raise ValueError(f"expected devices, or [base] device, got both: the latter is {grid.device!r}")
        chosen = worker_devices(devices)
        if len(chosen) > runs:
            raise ValueError(f"got {len(chosen)} devices for {runs} runs: expected as many runs at least")
        return chosen
    if jobs > 1:
        return (None,) * min(jobs, runs)
    if launch.count > 1:
        return ("cpu" if grid.device == "cpu" else launched_device(launch),)
    return None


def _run_all(
    grid: Grid,
    folder: Path,
    session: Session,
    base: Base | None,
    workers: tuple[str | None, ...] | None,
    together: int,
    progress: bool,
) -> list[Row]:
    """Every run of a grid, here or in processes; the tables are written after each by the one that has run it."""
    queue = RunQueue(grid, session, folder / RUNS)
    seen: set[int] = set()
    with tqdm(total=len(grid.runs), desc="sweep", disable=not progress) as bar:

        def look() -> bool:
            rows = queue.rows()
            for index in rows.keys() - seen:
                bar.set_postfix_str(f"{rows[index]['status']}: {rows[index]['name']}")
                bar.update()
            seen.update(rows)
            return len(rows) == len(grid.runs)

        if workers is None:
            work(folder, session, together, grid, base, progress=progress, look=look)
        else:
            work_in_processes(partial(work, folder, session, together), grid, workers, look)
        look()
    rows = queue.rows()
    return [rows[index] for index in sorted(rows)]


def work(
    folder: Path,
    session: Session,
    together: int,
    grid: Grid,
    base: Base | None = None,
    *,
    progress: bool = False,
    look: Callable[[], object] = lambda: None,
) -> None:
    """Train runs of a sweep, `together` at a time, until all of them have ended, here or elsewhere.

    grid: with the device of this process and the dtype of all. look: called after each run.
    Raises what loading the model or the data raises.
    """
    runner = (Runner if together == 1 else TogetherRunner)(grid, folder, base, progress=progress)
    queue = RunQueue(grid, session, folder / RUNS)
    with sole(folder):
        # so that it goes on in this dtype, should it be stopped before a run has ended
        if not session.resume or not (folder / TABLE).is_file():
            write_tables(folder, grid, list(queue.rows().values()))
    with closing(queue.bundles(together, lambda run: run.recipe.positions)) as bundles:
        for bundle in bundles:
            if together > 1:
                runner.train([(taken.run, taken.resume) for taken in bundle])
            for taken in bundle:
                queue.end(taken.index, runner(taken.run, resume=taken.resume))
                with sole(folder):
                    write_tables(folder, grid, list(queue.rows().values()))
                look()
