"""The runs of a sweep in several processes, each with a copy of the base and its share of the CPU's threads.

A training step on a few cores does not use them fully: products are small, and between them the work is serial. One
thread per process does. Step 1 of runs that share it is trained by one of them, before the others begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from lofit_fast.training.grid import Grid, Run
from lofit_fast.training.sweep_run import Runner

Row = dict[str, object]


def rows_of_processes(grid: Grid, folder: Path, jobs: int, resume: bool) -> Iterator[tuple[int, Row]]:
    """(index of a run, its row), as they end, from `jobs` processes.

    The calling program must have the guard that spawning asks for, `if __name__ == "__main__":`. Raises what loading
    the model or the data raises, and ChildProcessError when a process dies; runs that have ended are kept.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    # forking after torch has made threads can hang, and CUDA forbids it
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (grid, folder, threads, resume))
    try:
        yield from in_order_of_need(grid.runs, pool, _row)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {jobs} processes died, out of memory perhaps, since each holds a copy of the base. Finished runs "
            "are kept: run the sweep again, with fewer jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_order_of_need(runs: Sequence[Run], pool: Executor, work: Callable[[int], Row]) -> Iterator[tuple[int, Row]]:
    """(index, work(index)) of every run, as they end.

    Of the runs that share a step 1 one goes first, and the others when it has ended; should it fail, the next goes.
    """
    groups: dict[object, deque[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(_step1_of(index, run), deque()).append(index)
    running: dict[Future, tuple[int, deque[int]]] = {}

    def start(waiting: deque[int]) -> None:
        index = waiting.popleft()
        running[pool.submit(work, index)] = index, waiting

    for waiting in groups.values():
        start(waiting)
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            index, waiting = running.pop(future)
            row = future.result()
            while waiting:
                start(waiting)
                if row["status"] == "failed":
                    break
            yield index, row


def _step1_of(index: int, run: Run) -> object:
    """Equal for runs that share a step 1."""
    return index if run.heads is not None else (run.train_size, *run.recipe.of_step1().items())


# in a worker: what it was begun with, and the base once the first run has loaded it
_arguments: tuple = ()
_runner: Runner | None = None


def _begin(grid: Grid, folder: Path, threads: int, resume: bool) -> None:
    global _arguments
    torch.set_num_threads(threads)
    _arguments = grid, folder, resume


def _row(index: int) -> Row:
    global _runner
    grid, folder, resume = _arguments
    # here rather than at the beginning: an error in a pool's initializer reaches nobody
    if _runner is None:
        _runner = Runner(grid, folder, resume=resume, progress=False)
    return _runner(grid.runs[index])
