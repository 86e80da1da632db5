"""Scratch folders: where files are written until they are whole. What a killed process leaves is known, and removed.

A process holds a lock on each of its scratch folders, which the system releases when it ends, however it ends. A folder
that nobody holds is nobody's. Where the file system, or the system, knows no such locks, nothing is removed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows
    fcntl = None

_PREFIX = ".lofit-"
# with what tempfile appends
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")
_TRIES = 100


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new folder inside `path`, which is gone after the block. Raises OSError where none can be made."""
    remove_abandoned(path)
    scratch, lock = _made(path)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(path: Path) -> None:
    """Remove the scratch folders inside `path` whose process has ended. Says nothing where it cannot."""
    with suppress(OSError):
        names = [name for name in os.listdir(path) if _NAME.fullmatch(name)]
        # a link, or a file, of such a name is none of ours
        for left in (path / name for name in names if (path / name).is_dir() and not (path / name).is_symlink()):
            lock, _ = _try_lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def _made(path: Path) -> tuple[Path, int | None]:
    """(folder, the descriptor that holds its lock, None where there are no locks)."""
    for _ in range(_TRIES):
        scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))
        try:
            lock, held = _try_lock(scratch)
        except FileNotFoundError:
            # another process took it for abandoned before its lock was taken
            continue
        if held:
            continue
        if lock is None or scratch.is_dir():
            return scratch, lock
        os.close(lock)
    raise OSError(f"no scratch folder inside {path} lasts: something removes each at once")


def _try_lock(folder: Path) -> tuple[int | None, bool]:
    """(the descriptor that holds the folder's lock, None for no lock; whether another process holds it)."""
    if fcntl is None:
        return None, False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return None, isinstance(error, BlockingIOError)
    return descriptor, False
