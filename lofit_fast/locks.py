"""One process at a time: a lock on a file, which the system releases when its process ends, however it ends."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lofit_fast.files import write_json

_log = logging.getLogger(__name__)


@contextmanager
def alone(path: Path | str, what: str, *, wait: bool = False) -> Iterator[None]:
    """A scope that one process, and in it one thread, is in at a time.

    Args:
        path: the lock's file, in a folder that is there. It stays behind, and says nothing by being there.
        what: what the lock is for, as in "train in runs/mine".
        wait: whether to wait for the one that is inside, however long it takes, or to be refused. A line on standard
            error (of this module's logger) says for whom it waits.

    Raises:
        BlockingIOError (an OSError): with wait=False, naming the process and the host that are inside.
        OSError: the file cannot be written.
    """
    path = Path(path)
    owner = path.with_name(f"{path.name}.owner.json")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise BlockingIOError(f"cannot {what}: {_said(owner)} does so now; wait until it has ended") from None
        _log.warning("waiting to %s: %s does so now", what, _said(owner))
        lock.acquire()
    try:
        write_json(owner, {"process": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        try:
            # who was inside is no matter for what has been done there
            with suppress(OSError):
                owner.unlink()
        finally:
            lock.release()


def _said(owner: Path) -> str:
    """Who is inside, in words. The file is written just after the lock is taken, so it may not be there yet."""
    try:
        content = json.loads(owner.read_text())
        return f"process {content['process']} on host {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
