"""Faults at file operations, in this process from now on: it dies there, or the system refuses.

Python tells an audit hook of every file that is opened to be written, renamed, removed, made; the hook counts those
below one folder, and strikes at the one with the given number. What libraries write without Python meets a limit on
the size of files instead, which the kernel holds: a write that passes it is refused, or kills the process in its midst.
Hooks cannot be taken out again, so this is for processes of one trial.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# event -> where in its arguments a folder's descriptor is, to which a path may be relative
_CHANGES = {
    "os.rename": 2,
    "os.remove": 1,
    "os.mkdir": 2,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": None,
    "os.utime": 3,
}
DIE = "die"
KILLED_HERE = 9


class FileFaults:
    """Strikes at one file operation below a folder. count: how many there were so far.

    at: the number of the operation, from 1; 0 only counts. what: DIE, or the errno that the operation ends with.
    lasting: whether all later ones fail too, as on a full disk; else just this one.
    """

    def __init__(self, root: Path, at: int = 0, what: str | int = DIE, *, lasting: bool = False) -> None:
        self.root, self.at, self.what, self.lasting = os.path.realpath(root), at, what, lasting
        self.count = 0
        self._busy = False
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple) -> None:
        if self._busy or not self._changes(event, arguments):
            return
        self.count += 1
        if not self.at or self.count < self.at or (self.count > self.at and not self.lasting):
            return
        if self.what == DIE:
            os._exit(KILLED_HERE)
        # what frees room succeeds on a full disk
        if event in ("os.remove", "os.rmdir", "os.rename") and self.lasting:
            return
        raise OSError(self.what, os.strerror(self.what), _text(arguments[0]))

    def _changes(self, event: str, arguments: tuple) -> bool:
        """Whether an event changes something below the folder."""
        if event == "open":
            path, _, flags = arguments
            return isinstance(flags, int) and bool(flags & _WRITES) and self._below(path, None)
        if event not in _CHANGES:
            return False
        place = _CHANGES[event]
        return self._below(arguments[0], None if place is None else arguments[place])

    def _below(self, path: object, descriptor: object) -> bool:
        # a descriptor was opened by an event of its own
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        text = _text(path)
        self._busy = True
        try:
            if not os.path.isabs(text) and isinstance(descriptor, int) and descriptor >= 0:
                text = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), text)
            return f"{os.path.abspath(text)}/".startswith(f"{self.root}/")
        except OSError:
            return False
        finally:
            self._busy = False


def limit_files(size: int, *, deadly: bool) -> None:
    """No file of this process grows beyond `size` bytes from now on. deadly: the write that tries kills the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _text(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
