"""One row of a step-level cell, checked, warmed up and ready to be timed: in this process or in one of its own."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import Absent
from benchmarks.speed.step.loss_check import Checks, Reference
from benchmarks.speed.step.rows import Live, Row, live, uncopied
from benchmarks.speed.step.workload import Workload
from benchmarks.speed.timing import seconds_of
from lofit_fast.cpu.heap import release_free_memory
from lofit_fast.training.engine import Engine

# seconds a process has to end by itself, then to end when told to
_GRACE = 10.0


@dataclass(frozen=True)
class Job:
    """A row, and all that its host must know of it; can be pickled.

    reference: what its loss must be. rounds, examples: how many rounds there will be, and of how many examples.
    opened: how the row is put into a model, (base, row, engine, copied) -> a scope as `live` makes it.
    """

    row: Row
    work: Workload
    engine: Engine
    reference: Reference
    rounds: int
    examples: int
    opened: Callable[..., AbstractContextManager[Live]] = live

    def batches(self, one: Live, number: int) -> list[dict[str, Tensor]]:
        """A round's batches as the row makes them."""
        return one.batches(self.work.drawn(number, self.examples), self.work.pad)


class Round(NamedTuple):
    """What a round took, and how many graphs were compiled meanwhile."""

    seconds: float
    graphs: int


@dataclass(frozen=True)
class Served:
    """A row as its host hands it out.

    entry: what there is to report of it before it is timed. round: runs the round of a number; None where the row is
    absent or its loss is wrong, as `entry` says.
    """

    entry: dict
    round: Callable[[int], Round] | None


# what serves a row as long as its scope is open
Host = Callable[[Job], AbstractContextManager[Served]]


@contextmanager
def here(base: nn.Module, job: Job, copied: Callable = copy.deepcopy) -> Iterator[Served]:
    """Serve a row in this process, in a copy of the model."""
    checks = Checks(base, job.work, job.reference)
    with ExitStack() as scopes:
        # models here may share the code of a layer: past the limit torch would quietly run some of them uncompiled
        scopes.enter_context(torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True))
        try:
            one = scopes.enter_context(job.opened(base, job.row, job.engine, copied))
        except Absent as reason:
            served = Served({"absent": str(reason)}, None)
        else:
            served = _ready(one, checks, job)
        yield served


@contextmanager
def apart(load: Callable[[], nn.Module], job: Job) -> Iterator[Served]:
    """Serve a row in a process of its own, in the model that `load` loads there; job and load must be picklable.

    Raises RuntimeError naming the row where its process fails, with the traceback there. The process has ended when the
    scope is left, however that happens.
    """
    # OpenMP and torch's threads do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, load, job), daemon=True)
    process.start()
    theirs.close()

    def asked(number: int) -> Round:
        return _answer(pipe, process, job.row, number)

    try:
        entry, timed = _answer(pipe, process, job.row)
        yield Served(entry, asked if timed else None)
    finally:
        # a process that finds its pipe closed leaves its scopes, and with them what it has on disk
        for stop in (pipe.close, process.terminate, process.kill):
            stop()
            process.join(_GRACE)


def _ready(one: Live, checks: Checks, job: Job) -> Served:
    """The row after its check and, if that holds, its first pass."""
    started = time.perf_counter()
    check = checks(one)
    entry = {"check": check.as_dict(), **one.notes}
    if not check.ok:
        red = f"loss {check.loss:.5f}, expected {check.reference:.5f} +- {check.tolerance:.5f}"
        return Served({**entry, "red": red}, None)
    first = job.batches(one, 0)
    # nothing compiles in a stock loop beyond a hook's own function, and one batch warms that
    _steps(one, first[: 1 if job.row.how.stock else None])
    entry["warm_seconds"] = time.perf_counter() - started
    gc.collect()
    release_free_memory()
    return Served(entry, partial(_round, one, job))


def _round(one: Live, job: Job, number: int) -> Round:
    # a training is not paused after every few steps, while others take its pages and its place in the caches
    _steps(one, job.batches(one, number)[:1])
    graphs = _graphs()
    device = next(one.attached.model.parameters()).device.type
    seconds = seconds_of(lambda: _steps(one, job.batches(one, number)), device)
    return Round(seconds, _graphs() - graphs)


def _steps(one: Live, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        one.step(batch)


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@dataclass(frozen=True)
class _Failure:
    trace: str


def _serve(pipe: Connection, load: Callable[[], nn.Module], job: Job) -> None:
    """What the process of a row does: says that it is ready, then answers numbers with rounds until nobody asks."""
    # an interrupt from the keyboard is the parent's to handle; when told to end, scopes are left all the same
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with here(load(), job, copied=uncopied) as served:
            pipe.send((served.entry, served.round is not None))
            for number in _numbers(pipe) if served.round else ():
                pipe.send(served.round(number))
    except Exception:
        pipe.send(_Failure(traceback.format_exc()))


def _numbers(pipe: Connection) -> Iterator[int]:
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        yield number


def _answer(pipe: Connection, process: BaseProcess, row: Row, *question: int):
    try:
        for number in question:
            pipe.send(number)
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        process.join(_GRACE)
        raise RuntimeError(f"{row}: its process ended, with exit code {process.exitcode}") from None
    if isinstance(answer, _Failure):
        raise RuntimeError(f"{row}: its process failed\n{answer.trace}")
    return answer
