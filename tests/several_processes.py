"""A function in several processes of one gloo group, forked from the test: milliseconds each, where torchrun takes ten
seconds, since everything is imported already."""

from __future__ import annotations

import datetime
import faulthandler
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
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

# for one that waits for a process that has ended
_LIMIT = 60.0
# and for one that takes too long to say where it is
_GRACE = 2.0
# letters of what a process has written before it died, from its beginning and its end each
_WORDS = 8000
# what faulthandler says of modules, which is longer than all the rest
_LISTS = "Extension modules: "
# threads of a gloo group, as Linux shows them
_OF_A_GROUP = {"gloo_tcp_loop", "pt_gloo_runloop"}


class RanksError(AssertionError):
    """Some of the processes have failed; the text has their tracebacks, or the last words of those that died."""


def in_processes(
    n: int,
    work: Callable[[int], object],
    *,
    limit: float = _LIMIT,
    timeout: float = _LIMIT,
    dying: Collection[int] = (),
) -> list:
    """What `work(rank)` returns in each of n processes, by rank.

    work: runs in a forked process, in a gloo group of n, with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE); what it returns is pickled. limit: seconds after which all are killed. timeout: seconds that one
    waits for another. dying: the ranks that are meant to end before they return, whose answer is None.
    Raises RanksError, with the tracebacks, unless every process returns; a process that was killed is named, with what
    it wrote to stderr, where C++ says why it ends a process. RuntimeError where this process has a group of its own.
    """
    _check_alone()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        sys.stdout.flush()
        sys.stderr.flush()
        children = {_forked(rank, n, work, where, timeout): rank for rank in range(n)}
        ended = _ends(children, limit)
        answers, failed = [], []
        for rank in range(n):
            path = where / f"{rank}.answer"
            words = _said(where / f"{rank}.stderr")
            sys.stderr.write(words)
            silent = (True, None) if rank in dying else (False, f"ended with {ended[rank]}\n{words}".rstrip())
            ok, value = pickle.loads(path.read_bytes()) if path.exists() else silent
            answers.append(value)
            if not ok:
                failed.append(f"rank {rank}: {value}")
        if failed:
            raise RanksError("\n".join(failed))
        return answers


def _check_alone() -> None:
    """Raise RuntimeError where this process has threads of a gloo group, open or left behind.

    A fork has the group without its threads, and waits for them for ever once it lets go of the group.
    """
    found = set()
    for path in Path("/proc/self/task").glob("*/comm"):
        # a thread may end meanwhile
        with suppress(OSError):
            found.add(path.read_text().strip())
    if found & _OF_A_GROUP:
        raise RuntimeError(
            "this process has, or has left behind, a gloo group, which a forked process would have without its "
            f"threads ({', '.join(sorted(found & _OF_A_GROUP))}): make the group in a process of its own"
        )


def _forked(rank: int, n: int, work: Callable[[int], object], where: Path, timeout: float) -> int:
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            # newer Pythons warn where there are threads: the child computes with one of its own
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            # what the test's process has made is not looked through for garbage again, nor copied for it. nor is it let
            # go of: what waits for its threads then, finds none here
            gc.freeze()
    finally:
        if collects:
            gc.enable()
    if pid:
        return pid
    # never returns: the test's own process goes on elsewhere
    try:
        _write_to(where / f"{rank}.stderr")
        answer = (True, _in_group(rank, n, work, where, timeout))
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        part = where / f"{rank}.part"
        part.write_bytes(pickle.dumps(answer))
        part.rename(where / f"{rank}.answer")
    finally:
        os._exit(0)


def _write_to(path: Path) -> None:
    """Let a file have what C++ writes to stderr, and where each thread was if abort or its like ends the process.

    What Python writes goes where it went.
    """
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.enable(2)
    # C++'s frames of every thread; faulthandler adds Python's
    torch._C._set_print_stack_traces_on_fatal_signal(True)


def _said(path: Path) -> str:
    """What a process has written there; of a long text the beginning and the end."""
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(_LISTS))
    return text if len(text) <= 2 * _WORDS else f"{text[:_WORDS]}\n[...]\n{text[-_WORDS:]}"


def _in_group(rank: int, n: int, work: Callable[[int], object], where: Path, timeout: float) -> object:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), TOKENIZERS_PARALLELISM="false"
    )
    torch.set_num_threads(1)
    store = dist.FileStore(str(where / "store"), n)
    limit = datetime.timedelta(seconds=timeout)
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
            # first so that each writes where its threads are
            for pid in children:
                os.kill(pid, signal.SIGABRT)
            time.sleep(_GRACE)
            for pid, rank in children.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended[rank] = f"a kill after {limit:.0f} s"
            break
        time.sleep(0.005)
    return ended
