"""Kills a training, a sweep, an export at any moment and at any file operation, restarts it, and compares the results.

    python -m benchmarks.proof.reliability.kill_anywhere [--count 200] [--minutes 60] [--only "moment fit"]

Four ways: SIGKILL at a random moment of the run's processor time, up to three times in one run; death at one of its
file operations; a system that refuses one (no space, quota, a failed write); a limit on the size of files, which kills
in the midst of a write or refuses it. Then it is called again until it is done. The results must be those of a run that
nothing has stopped, bit for bit, no file may ever be there in part, and nothing of an interrupted write may stay.
"""

from __future__ import annotations

import errno
import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.proof.reliability.file_faults import DIE, KILLED_HERE, FileFaults, limit_files
from benchmarks.proof.reliability.forked import Ended, forked
from benchmarks.proof.reliability.killed_works import WORKS, Work
from benchmarks.proof.reliability.same_folders import difference, partly_there, results, scratch
from benchmarks.proof.reliability.trial_journal import Proof, Trial, run

PROOF = Proof(
    "kill",
    1,
    "trainings, DPO, sweeps, exports, saves, conversions and caches killed at random moments, at file operations and "
    "within writes, or refused a write (no space, quota, input/output error), then restarted",
    "python -m benchmarks.proof.reliability.kill_anywhere",
)
# errno -> whether all later operations fail too
REFUSALS = ((errno.ENOSPC, True), (errno.EIO, False), (errno.EDQUOT, True))
_MOST_KILLS, _AGAIN = 3, 0.3
# a run's processor time varies: where it has ended before its moment, another is drawn
_DRAWS = 5


@dataclass(frozen=True)
class Whole:
    """A work that nothing has stopped. cpu: seconds it took. operations: on files. largest: bytes of a file."""

    name: str
    work: Work
    folder: Path
    cpu: float
    operations: int
    largest: int


def begin_in(folder: Path, work: Work) -> Path:
    """An empty folder with what the work begins with."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work.prepare(folder)
    return folder


def call_in(folder: Path, work: Work, before: Callable[[], object] = lambda: None, **kill) -> Ended:
    """The work in a process of its own. before: done there first."""

    def call() -> None:
        before()
        work.run(folder)

    return forked(call, LOFIT_FAST_CACHE=str(folder / "cache"), **kill)


def import_what_it_needs(work: Work, folder: Path) -> int:
    """Run a work once; import here all that it imports, so that no later child waits for it. Returns its operations."""
    noted = folder.with_suffix(".modules")

    def imports() -> int:
        before, faults = set(sys.modules), FileFaults(folder)
        work.run(folder)
        noted.write_text(json.dumps([module for module in sys.modules if module not in before]))
        return faults.count

    begin_in(folder, work)
    operations = _demand(forked(imports, LOFIT_FAST_CACHE=str(folder / "cache"))).value
    for module in json.loads(noted.read_text()):
        if not module.startswith("__"):
            _imported(module)
    return operations


@cache
def whole_run(name: str, root: Path) -> Whole:
    """The run that the others are compared with."""
    work, folder, counted = WORKS[name], root / "expected" / name.replace(" ", "-"), root / "counted"
    operations = import_what_it_needs(work, counted)
    begin_in(folder, work)
    ended = _demand(call_in(folder, work))
    if wrong := difference(folder, counted):
        raise RuntimeError(f"{name}: two runs that nothing stopped differ: {wrong}")
    sizes = [path.stat().st_size for path in results(folder).values()]
    return Whole(name, work, folder, ended.cpu, operations, max(sizes, default=1))


def _demand(ended: Ended) -> Ended:
    if not ended.done:
        raise RuntimeError(f"it does not even run undisturbed: {ended}")
    return ended


def _imported(module: str) -> None:
    try:
        importlib.import_module(module)
    # what only half of its library can load: the run has not failed for it
    except Exception:
        return


def at_moments(whole: Whole, draw: random.Random, folder: Path) -> str | None:
    """SIGKILL at a random moment, and perhaps again in the restarts. Returns what went wrong."""
    for _ in range(_DRAWS):
        begin_in(folder, whole.work)
        kills = 0
        while True:
            again = kills == 0 or (kills < _MOST_KILLS and draw.random() < _AGAIN)
            moment = draw.uniform(0, whole.cpu) if again else None
            ended = call_in(folder, whole.work, kill_at=moment, late=draw.uniform(0, 0.01))
            if ended.done:
                break
            if wrong := _after_kill(ended, whole, folder):
                return wrong
            kills += 1
        if kills:
            return _at_the_end(whole, folder)
    return f"ended before its moment {_DRAWS} times: nothing was tried"


def _after_kill(ended: Ended, whole: Whole, folder: Path) -> str | None:
    if ended.hung:
        return "does not end"
    if not ended.killed and ended.status not in (KILLED_HERE, -25):
        return f"the restart ends with {_said(ended)}"
    return partly_there(folder) or whole.work.check(folder)


def _at_the_end(whole: Whole, folder: Path, near: bool = False) -> str | None:
    if wrong := difference(whole.folder, folder, near=near) or whole.work.check(folder):
        return wrong
    left = [path.relative_to(folder).parent.as_posix() for path in scratch(folder)]
    return f"scratch of a killed write is left in {left[0]}" if left else None


def with_fault(whole: Whole, folder: Path, fault: Callable[[], object]) -> str | None:
    """One run in which a fault strikes, then one without. Returns what went wrong."""
    begin_in(folder, whole.work)
    ended = call_in(folder, whole.work, fault)
    if ended.status == 1 and not ended.killed:
        if "OSError" not in ended.raised:
            return f"a refused write ends with {_said(ended)}"
        if str(folder) not in ended.message:
            return f"a refused write does not name its file: {_said(ended)}"
        if wrong := partly_there(folder) or whole.work.check(folder):
            return wrong
    elif not ended.done and (wrong := _after_kill(ended, whole, folder)):
        return wrong
    # one that was refused its cache went on without, and computes the same to rounding
    near = whole.work.optional and ended.status in (0, 1)
    again = call_in(folder, whole.work)
    if not again.done:
        return f"the restart ends with {_said(again)}"
    return _at_the_end(whole, folder, near)


def _said(ended: Ended) -> str:
    if not ended.raised:
        return f"status {ended.status}"
    return f"{ended.raised[0]}: {' '.join(ended.message.split())[:160]}"


def fault_of(way: str, whole: Whole, folder: Path, number: int, draw: random.Random) -> Callable[[], object]:
    """What strikes in a run: the number-th of its operations in an order of their own, or a drawn limit."""
    order = random.Random(whole.name).sample(range(1, whole.operations + 1), whole.operations)
    at = order[number % len(order)]
    what, lasting = draw.choice(REFUSALS)
    # most files are small: even over the sizes' logarithm
    size = int(whole.largest ** draw.random())
    return {
        "operation": lambda: FileFaults(folder, at, DIE),
        "refused": lambda: FileFaults(folder, at, what, lasting=lasting),
        "torn": lambda: limit_files(size, deadly=True),
        "full": lambda: limit_files(size, deadly=False),
    }[way]


def tried(way: str, name: str, number: int, seed: int, root: Path) -> str | None:
    """One trial: a way to stop a work. Returns what went wrong."""
    whole, folder = whole_run(name, root), root / "trial"
    draw = random.Random(f"{seed}/{way}/{name}/{number}")
    if way == "moment":
        return at_moments(whole, draw, folder)
    return with_fault(whole, folder, fault_of(way, whole, folder, number, draw))


# way to stop a work -> its share of the moments' number
WAYS = {"moment": 1.0, "operation": 1.0, "refused": 0.5, "torn": 0.25, "full": 0.25}


def trials(options, root: Path) -> Iterator[Trial]:
    """`count` moments, as many operations, and half as many refusals and limits, of all works in turn."""
    torch.set_num_threads(1)
    root = root.absolute()
    for number in range(-(-options.count // len(WORKS))):
        for way, share in WAYS.items():
            # every second, or fourth
            if number % round(1 / share):
                continue
            for name in WORKS:
                call = partial(tried, way, name, number, options.seed, root)
                yield Trial(f"{way} {name} {options.seed} {number}", f"{way} {name}", call)


if __name__ == "__main__":
    run(PROOF, trials, 200)
