"""A function in several processes of one gloo group, forked from the test: milliseconds each, where torchrun takes ten
seconds, since everything is imported already."""

from __future__ import annotations

import datetime
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.distributed as dist

# for one that waits for a process that has ended
_LIMIT = 60.0


class RanksError(AssertionError):
    """Some of the processes have failed; the text has their tracebacks."""


def in_processes(n: int, work: Callable[[int], object], *, limit: float = _LIMIT, dying: Collection[int] = ()) -> list:
    """What `work(rank)` returns in each of n processes, by rank.

    work: runs in a forked process, in a gloo group of n, with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE); what it returns is pickled. limit: seconds after which all are killed. dying: the ranks that are
    meant to end before they return, whose answer is None.
    Raises RanksError, with the tracebacks, unless every process returns; a process that was killed is named.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        sys.stdout.flush()
        sys.stderr.flush()
        children = {_forked(rank, n, work, where): rank for rank in range(n)}
        ended = _ends(children, limit)
        answers, failed = [], []
        for rank in range(n):
            path = where / f"{rank}.answer"
            silent = (rank in dying, None if rank in dying else f"ended with {ended[rank]}")
            ok, value = pickle.loads(path.read_bytes()) if path.exists() else silent
            answers.append(value)
            if not ok:
                failed.append(f"rank {rank}: {value}")
        if failed:
            raise RanksError("\n".join(failed))
        return answers


def _forked(rank: int, n: int, work: Callable[[int], object], where: Path) -> int:
    with warnings.catch_warnings():
        # newer Pythons warn where there are threads: the child computes with one of its own
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    # never returns: the test's own process goes on elsewhere
    try:
        answer = (True, _in_group(rank, n, work, where))
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        part = where / f"{rank}.part"
        part.write_bytes(pickle.dumps(answer))
        part.rename(where / f"{rank}.answer")
    finally:
        os._exit(0)


def _in_group(rank: int, n: int, work: Callable[[int], object], where: Path) -> object:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), TOKENIZERS_PARALLELISM="false"
    )
    torch.set_num_threads(1)
    # what the test's process has made is not looked through for garbage again, nor copied for it
    gc.freeze()
    store = dist.FileStore(str(where / "store"), n)
    limit = datetime.timedelta(seconds=_LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=limit)
    # none leaves before all have met
    dist.barrier()
    try:
        return work(rank)
    finally:
        # one that has lost the others has left it
        if dist.is_initialized():
            dist.destroy_process_group()


def _ends(children: dict[int, int], limit: float) -> dict[int, str]:
    """How each rank has ended, in words; those that take too long are killed."""
    ended: dict[int, str] = {}
    until = time.monotonic() + limit
    while children:
        for pid, rank in list(children.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[rank] = f"status {os.waitstatus_to_exitcode(status)}"
                del children[pid]
        if time.monotonic() > until:
            for pid, rank in children.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended[rank] = f"a kill after {limit:.0f} s"
            break
        time.sleep(0.005)
    return ended
