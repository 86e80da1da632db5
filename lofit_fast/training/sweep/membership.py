"""The processes that are in one sweep: the first begins it, others that bring the same join, the rest are refused.

A process that is in a sweep holds a lock on a file of its own, so that those that have died are known. Under one job of
torchrun or SLURM a late process belongs to the sweep of the others even when these have ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lofit_fast.extras import shared_versions
from lofit_fast.files import read_json, write_json
from lofit_fast.locks import alone
from lofit_fast.training.sweep.grid import Grid
from lofit_fast.training.sweep.launched import Launch

LOCK, QUEUE = "sweep.lock", "queue"
CLAIMS, ROWS, MEMBERS = "claims", "rows", "members"
_SESSION = "session.json"
# how long others may have the folder before it is said that they are waited for
_PATIENCE = 10.0


@dataclass(frozen=True)
class Session:
    """One sweep, from when the first process has begun it until the last has left. queue: the folder that it keeps.

    resume: whether it goes on with what earlier ones have left. dtype: of all runs. begun_here: whether this process
    has begun it. others: who else is in it, in words.
    """

    queue: Path
    resume: bool
    dtype: str
    begun_here: bool
    others: tuple[str, ...] = ()


@contextmanager
def member(
    folder: Path, grid: Grid, resume: bool, launch: Launch, dtype: Callable[[], str], clear: Callable[[], None]
) -> Iterator[Session]:
    """A scope in which this process is in the sweep of a folder, which it begins or joins.

    dtype: of a sweep that begins; clear: takes away what a sweep that begins anew (resume=False) does not go on with.
    Raises BlockingIOError where processes are in another sweep there, ValueError where their libraries or dtype differ.
    """
    queue = folder / QUEUE
    with ExitStack() as stack:
        with sole(folder):
            others, kept = _living(queue / MEMBERS), _kept(queue / _SESSION)
            late = kept is not None and _is_late(kept, launch)
            mine = _about(grid, resume)
            if kept is not None and (others or late):
                _check_same(folder, kept, mine, others)
                kept["members"].append(launch.member)
            else:
                kept = {**mine, "dtype": dtype(), "job": launch.job, "members": [launch.member]}
                _begin(queue, clear if not resume else None)
            write_json(queue / _SESSION, kept)
            name = f"{socket.gethostname()[:100]}-{os.getpid()}-{uuid.uuid4().hex[:8]}.lock"
            stack.enter_context(alone(queue / MEMBERS / name, "be in a sweep"))
        try:
            yield Session(queue, kept["resume"], kept["dtype"], kept["members"] == [launch.member], tuple(others))
        finally:
            with suppress(OSError):
                (queue / MEMBERS / name).unlink()


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """A scope in which one process of a sweep writes what all share; the others wait their moment."""
    until = time.monotonic() + _PATIENCE
    what = f"write in {folder}"
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(alone(folder / LOCK, what, wait=time.monotonic() > until))
                break
            except BlockingIOError:
                time.sleep(0.02)
        yield


def _begin(queue: Path, clear: Callable[[], None] | None) -> None:
    for name in (CLAIMS, ROWS):
        shutil.rmtree(queue / name, ignore_errors=True)
    for name in (CLAIMS, ROWS, MEMBERS):
        (queue / name).mkdir(parents=True, exist_ok=True)
    if clear is not None:
        clear()


def _living(members: Path) -> list[str]:
    """Who is in the sweep, in words. The files of those that have died are removed."""
    found = []
    for path in sorted(members.glob("*.lock")):
        try:
            with alone(path, "be in a sweep"), suppress(OSError):
                path.unlink()
        except BlockingIOError as error:
            found.append(str(error).partition(": ")[2].partition(" does so now")[0])
    return found


def _kept(path: Path) -> dict | None:
    """What a sweep has said of itself; None where nothing was said, or it is damaged."""
    try:
        kept = read_json(path)
        whole = {"grid", "resume", "versions", "dtype", "job", "members"} <= kept.keys()
        return kept if whole and isinstance(kept["members"], list) else None
    except (OSError, ValueError, AttributeError):
        return None


def _is_late(kept: dict, launch: Launch) -> bool:
    """Whether this process belongs to the job of a sweep that others have ended, and was not in it itself."""
    return bool(launch.job) and kept["job"] == launch.job and launch.member not in kept["members"]


def digest_of_grid(grid: Grid) -> str:
    """SHA-256 of what the processes of a sweep must agree in; the device may be each one's own."""
    content = {key: value for key, value in asdict(grid).items() if key not in ("device", "dtype")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _about(grid: Grid, resume: bool) -> dict:
    about = {"grid": digest_of_grid(grid), "asked_dtype": grid.dtype, "resume": resume}
    # what decides a run's numbers beside the grid
    return about | {"versions": shared_versions()}


def _check_same(folder: Path, kept: dict, mine: dict, others: list[str]) -> None:
    who = ", ".join(others) or "another process of this job"
    if kept["grid"] != mine["grid"] or kept.get("asked_dtype") != mine["asked_dtype"]:
        raise BlockingIOError(
            f"cannot sweep in {folder}: {who} sweeps another grid there; wait until it has ended, or choose another "
            "folder"
        )
    if kept["resume"] and not mine["resume"]:
        raise BlockingIOError(
            f"cannot start over in {folder}: {who} is in a sweep there that goes on with what was left; wait until it "
            "has ended"
        )
    ours, theirs = mine["versions"], kept["versions"]
    if differing := [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]:
        here, there = (", ".join(f"{name} {has.get(name)}" for name in differing) for has in (ours, theirs))
        raise ValueError(
            f"expected the same libraries in all processes of the sweep in {folder}, got {here} here and {there} where "
            "it was begun"
        )
