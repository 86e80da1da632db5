"""The SHA-256 of a large file, computed once for as long as the file is the same one.

A file is the same if its place, inode, size and both of its times to the nanosecond are. The time of the last change
(ctime) is set by the system at every write, rename or change of the other time, and no program can set it back. A file
that was changed within `SETTLED_SECONDS` before it is read is hashed again the next time: a clock that ticks slowly
would give a second change the same time.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from lofit_fast.checksums import sha256_of
from lofit_fast.files import write_json
from lofit_kernels.answers import cache_folder, ignore, kept_json

SETTLED_SECONDS = 10.0
_HELD = "checksum"


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits, kept in the cache folder of lofit-fast.

    Raises OSError for a file that cannot be read. Where nothing can be written, it is computed every time; where what
    was kept is damaged, once more, and a warning says so.
    """
    path = path.resolve()
    before, note = _identity(path), _note(path)
    known = None if note is None else kept_json(note, _HELD)
    if known is not None:
        try:
            if known["file"] == before:
                return _checked(known["sha256"])
        except (KeyError, TypeError, ValueError) as error:
            ignore(note, _HELD, repr(error))
    digest = sha256_of(path)
    settled = time.time() - path.stat().st_ctime > SETTLED_SECONDS
    if note is not None and settled and _identity(path) == before:
        with suppress(OSError):
            write_json(note, {"path": str(path), "file": before, "sha256": digest})
    return digest


def _note(path: Path) -> Path | None:
    """Where a file's checksum is kept; None where nothing can be."""
    try:
        return cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    except FileNotFoundError:
        return None


def _checked(digest: object) -> str:
    """A checksum as it was read. Raises ValueError for what is none."""
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("expected 64 hexadecimal digits")
    return digest


def _identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
