"""The SHA-256 of a large file, computed once for as long as the file is the same one.

A file is the same if its place, inode, size and both of its times to the nanosecond are. The time of the last change
(ctime) is set by the system at every write, rename or change of the other time, and no program can set it back. A file
that was changed within `SETTLED_SECONDS` before it is read is hashed again the next time: a clock that ticks slowly
would give a second change the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from lofit_fast.files import write_json
from lofit_kernels.answers import cache_folder

SETTLED_SECONDS = 10.0


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits, kept in the cache folder of lofit-fast.

    Raises OSError for a file that cannot be read. Where nothing can be written, it is computed every time.
    """
    path = path.resolve()
    note = cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    before = _identity(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text())
        if known["file"] == before and len(known["sha256"]) == 64:
            return known["sha256"]
    digest = sha256_of(path)
    settled = time.time() - path.stat().st_ctime > SETTLED_SECONDS
    if settled and _identity(path) == before:
        with suppress(OSError):
            write_json(note, {"path": str(path), "file": before, "sha256": digest})
    return digest


def sha256_of(path: Path) -> str:
    """The checksum of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
