"""Workers of a sweep: processes with a copy of the base each, on a device of their own or a share of the CPU's threads.

A training step on a few cores does not use them fully: products are small, and between them the work is serial. One
thread per process does. Workers speak to nobody: each takes runs from the sweep's queue until none is left.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection

import torch

from lofit_fast.models.shared_pages import processes_here, work_beside
from lofit_fast.training.sweep.grid import Grid
from lofit_fast.training.sweep.launched import worker_environment
from lofit_fast.training.sweep.worker_devices import inside

_log = logging.getLogger(__name__)
# seconds between two looks at what has ended
_LOOK = 0.5
_DEATH = "its process died: out of memory perhaps, since each holds a copy of the base"


def work_in_processes(
    work: Callable[[Grid], None], grid: Grid, devices: Sequence[str | None], look: Callable[[], bool]
) -> None:
    """Call `work(grid)` in one process per device; they end with this one, however it ends.

    work: a function that can be pickled, which returns when the sweep has ended. devices: of each worker, as this
    process calls it; None leaves it to the grid. look: called now and then, tells whether all runs have ended.
    A worker that fails is said and left: the others take up its run. The calling program must have the guard that
    spawning asks for, `if __name__ == "__main__":`.
    Raises, when none is left and runs are, what the first that failed has raised; ChildProcessError when all died.
    """
    # forking after torch has made threads can hang, and CUDA forbids it
    context = get_context("spawn")
    # nothing is ever sent: the workers wait for its end, which comes even if this process is killed
    watched, held = context.Pipe(duplex=False)
    threads = max(1, torch.get_num_threads() // len(devices))
    # each process of a launch may have workers
    beside = len(devices) * processes_here()
    # begun with the first process otherwise, and would let it hear of interrupts
    resource_tracker.ensure_running()
    with ExitStack() as pools:
        pools.callback(watched.close)
        pools.callback(held.close)
        try:
            running: dict[Future, int] = {}
            for number, device in enumerate(devices):
                # one each, since a pool of several ends when one of them does
                pool = pools.enter_context(ProcessPoolExecutor(1, context, _begin, (threads, beside, watched)))
                own = grid if device is None else replace(grid, device=inside(device))
                with _interrupts_held(), worker_environment(device):
                    running[pool.submit(work, own)] = number
            _watch(running, devices, look)
        except BaseException:
            held.close()
            raise


def _watch(running: dict[Future, int], devices: Sequence[str | None], look: Callable[[], bool]) -> None:
    """Wait until all workers have ended, telling of those that fail."""
    first: BaseException | None = None
    while running:
        ended = wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED).done
        all_ended = look()
        for future in ended:
            number = running.pop(future)
            if (error := future.exception()) is None:
                continue
            first = error if first is None or isinstance(first, BrokenProcessPool) else first
            if running and not all_ended:
                said = _DEATH if isinstance(error, BrokenProcessPool) else f"{type(error).__name__}: {error}"
                _log.warning("%s has ended (%s): the others go on, with its run too", _name(number, devices), said)
    if first is None or look():
        return
    if not isinstance(first, BrokenProcessPool):
        raise first
    died = f"one of {len(devices)} processes died, and so did all others" if len(devices) > 1 else "the worker died"
    raise ChildProcessError(
        f"{died}: out of memory perhaps, since each holds a copy of the base (fewer jobs help then), or for want of "
        'if __name__ == "__main__": in the calling script. Finished runs are kept'
    ) from first


def _name(number: int, devices: Sequence[str | None]) -> str:
    on = "" if devices[number] is None else f" on {devices[number]}"
    return f"worker {number + 1} of {len(devices)}{on}"


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


def _begin(threads: int, beside: int, watched: Connection) -> None:
    threading.Thread(target=end_with, args=(watched,), daemon=True).start()
    torch.set_num_threads(threads)
    work_beside(beside)


def end_with(watched: Connection) -> None:
    """End this process at once when the other end of the pipe is closed; files are written whole or not at all."""
    with suppress(EOFError, OSError):
        watched.recv()
    os._exit(1)
