"""The runs of a sweep in several processes, each with a copy of the base and its share of the CPU's threads.

A training step on a few cores does not use them fully: products are small, and between them the work is serial. One
thread per process does. Step 1 of runs that share it is trained by one of them, before the others begin.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from lofit_fast.training.sweep.grid import Grid, Run
from lofit_fast.training.sweep.one_run import Runner

Row = dict[str, object]


def rows_of_processes(grid: Grid, folder: Path, jobs: int, resume: bool) -> Iterator[tuple[int, Row]]:
    """(index of a run, its row), as they end, from `jobs` processes, which end with this one, however it ends.

    The calling program must have the guard that spawning asks for, `if __name__ == "__main__":`. Raises what loading
    the model or the data raises, and ChildProcessError when a process dies; runs that have ended are kept, and what
    others were doing is stopped.
    """
    # forking after torch has made threads can hang, and CUDA forbids it
    context = get_context("spawn")
    # nothing is ever sent: the workers wait for its end, which comes even if this process is killed
    watched, held = context.Pipe(duplex=False)
    threads = max(1, torch.get_num_threads() // jobs)
    # begun with the first process otherwise, and would let it hear of interrupts
    resource_tracker.ensure_running()
    pool = ProcessPoolExecutor(jobs, context, _begin, (grid, folder, threads, resume, watched))
    try:
        yield from in_order_of_need(grid.runs, pool, row_of_run, jobs)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {jobs} processes died: out of memory perhaps, since each holds a copy of the base (fewer jobs "
            'help then), or for want of if __name__ == "__main__": in the calling script. Finished runs are kept'
        ) from error
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held.close()
        watched.close()


def in_order_of_need(
    runs: Sequence[Run], pool: Executor, work: Callable[[int], Row], jobs: int
) -> Iterator[tuple[int, Row]]:
    """(index, work(index)) of every run, as they end; never more than `jobs` handed to the pool.

    Of the runs that share a step 1 one goes first, and the others when it has ended; should it fail, the next goes.
    """
    groups: dict[object, deque[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(_step1_of(index, run), deque()).append(index)
    ready = deque((waiting.popleft(), waiting) for waiting in groups.values())
    running: dict[Future, tuple[int, deque[int]]] = {}
    while ready or running:
        while ready and len(running) < jobs:
            index, waiting = ready.popleft()
            with _interrupts_held():
                future = pool.submit(work, index)
            running[future] = index, waiting
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            index, waiting = running.pop(future)
            row = future.result()
            if waiting and row["status"] == "failed":
                ready.append((waiting.popleft(), waiting))
            while waiting and row["status"] != "failed":
                ready.append((waiting.popleft(), deque()))
            yield index, row


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A scope whose processes never hear of Ctrl-C, not even while they begin; this one does, at its end.

    A terminal tells all of them at once. This one then ends the others, without a word from each.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _step1_of(index: int, run: Run) -> object:
    """Equal for runs that share a step 1."""
    return index if run.heads is not None else (run.train_size, *run.recipe.of_step1().items())


# in a worker: what it was begun with, and the base once the first run has loaded it
_arguments: tuple = ()
_runner: Runner | None = None


def _begin(grid: Grid, folder: Path, threads: int, resume: bool, watched: Connection) -> None:
    global _arguments
    threading.Thread(target=end_with, args=(watched,), daemon=True).start()
    torch.set_num_threads(threads)
    _arguments = grid, folder, resume


def end_with(watched: Connection) -> None:
    """End this process at once when the other end of the pipe is closed; files are written whole or not at all."""
    with suppress(EOFError, OSError):
        watched.recv()
    os._exit(1)


def row_of_run(index: int) -> Row:
    """In a worker: the row of the grid's run of this number; the base is loaded for the first."""
    global _runner
    grid, folder, resume = _arguments
    # here rather than at the beginning: an error in a pool's initializer reaches nobody
    if _runner is None:
        _runner = Runner(grid, folder, resume=resume, progress=False)
    return _runner(grid.runs[index])
