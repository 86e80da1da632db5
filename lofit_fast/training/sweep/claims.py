"""Who trains a run: a lock per run, which the system releases when its process ends, and a word on who had it before.

The locks are the file system's. Where hosts share a folder, but not its locks, two of them would train one run; a file
that the holder touches every few seconds tells that from a process that has died.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lofit_fast.files import read_json, write_json
from lofit_fast.locks import alone

# seconds between two touches, and after which a holder on another host that shows none is dead
BEAT, SILENCE = 5.0, 17.0


@dataclass(frozen=True)
class Claim:
    """What is known of a run that this process now has.

    begun: whether a process has begun it in this sweep. deaths: how many have died in it, one after the other, and
    brought it no further. by: the last that had it, in words.
    """

    begun: bool = False
    deaths: int = 0
    by: str = ""


@dataclass
class _Kept:
    host: str
    process: int
    held: bool
    deaths: int
    progress: int


@contextmanager
def claimed(folder: Path, name: str, progress: int = 0) -> Iterator[Claim]:
    """A scope in which a run is this process's, and thread's, alone.

    folder: where claims are kept, which is there. progress: how far the run is, in any measure. What leaves the scope,
    by an interrupt too, has not died.
    Raises BlockingIOError where another has it, OSError for a file system whose locks do not reach between hosts.
    """
    path = folder / f"{name}.json"
    with alone(folder / f"{name}.lock", f"train {name}"):
        before = _read(path)
        died = before is not None and before.held
        if died and before.host != socket.gethostname():
            _check_silent(path, before)
        deaths = 0 if before is None or before.progress != progress else before.deaths + died
        mine = _Kept(socket.gethostname(), os.getpid(), True, deaths, progress)
        write_json(path, asdict(mine))
        try:
            with _beating(path):
                by = "" if before is None else f"process {before.process} on host {before.host}"
                yield Claim(before is not None, deaths, by)
        finally:
            mine.held = False
            write_json(path, asdict(mine))


def _read(path: Path) -> _Kept | None:
    """What the last holder has left; None where there was none, or it says nothing."""
    try:
        kept = _Kept(**read_json(path))
        whole = type(kept.deaths) is int and type(kept.held) is bool and isinstance(kept.host, str)
        return kept if whole else None
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _beating(path: Path) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            try:
                os.utime(path)
            except OSError:
                # the folder was taken away, or is unreachable for now
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _check_silent(path: Path, before: _Kept) -> None:
    """Raise OSError where the holder on another host, whose lock we have, is alive."""
    first, until = _touched(path), time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENCE / 10))
        if _touched(path) != first:
            raise OSError(
                f"the locks of {path.parent} do not reach between hosts: process {before.process} on host "
                f"{before.host} is in a run whose lock this host has too. Expected a file system with locks that "
                "hosts share (NFS with its lock service, Lustre mounted with flock), or a sweep on one host"
            )


def _touched(path: Path) -> int:
    # to open a file asks its server; the time alone may come from a cache
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
