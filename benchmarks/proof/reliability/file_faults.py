"""Faults at file operations, in this process from now on: it dies there, or the system refuses.

Python tells an audit hook of every file that is opened to be written, renamed, removed, made; the hook counts those
below one folder, and strikes at the one with the given number. What libraries write without Python meets a limit on
the size of files instead, which the kernel holds: a write that passes it is refused, or kills the process in its midst.
Hooks cannot be taken out again, so faults are for processes of one trial.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# event -> (how many paths it names, where in its arguments the folders' descriptors begin, to which they may be
# relative)
_CHANGES = {
    "os.rename": (2, 2),
    "os.remove": (1, 1),
    "os.mkdir": (1, 2),
    "os.rmdir": (1, 1),
    "os.link": (2, 2),
    "os.symlink": (2, 2),
    "os.truncate": (1, None),
    "os.utime": (1, 3),
}
# where something is made, not what is named by it
_MADE_AT_THE_SECOND = ("os.link", "os.symlink")
DIE = "die"
KILLED_HERE = 9


def changed(event: str, arguments: tuple) -> Iterator[str]:
    """The absolute paths that an audit event is about to change; none for one that changes nothing."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITES:
            yield from _absolute(path, None)
    elif event in _CHANGES:
        count, first = _CHANGES[event]
        for place in range(count):
            if place == 0 and event in _MADE_AT_THE_SECOND:
                continue
            # a symbolic link has one descriptor
            at = None if first is None else min(first + place, len(arguments) - 1)
            yield from _absolute(arguments[place], None if at is None else arguments[at])


def _absolute(path: object, descriptor: object) -> Iterator[str]:
    # what is open already was opened by an event of its own
    if not isinstance(path, str | bytes | os.PathLike):
        return
    text = os.fsdecode(path)
    if not os.path.isabs(text) and isinstance(descriptor, int) and descriptor >= 0:
        try:
            text = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), text)
        except OSError:
            return
    yield os.path.abspath(text)


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
        if self._busy:
            return
        self._busy = True
        try:
            paths = [path for path in changed(event, arguments) if f"{path}/".startswith(f"{self.root}/")]
        finally:
            self._busy = False
        if not paths:
            return
        self.count += 1
        if not self.at or self.count < self.at or (self.count > self.at and not self.lasting):
            return
        if self.what == DIE:
            os._exit(KILLED_HERE)
        # what takes no room succeeds on a full disk
        if self.lasting and event in ("os.remove", "os.rmdir", "os.rename"):
            return
        raise OSError(self.what, os.strerror(self.what), paths[0])


class OutsideWatch:
    """Notes what this process changes outside of one folder, wherever links lead, in scopes of it.

    allowed: the folder's path, which may be set anew for every scope.
    """

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        self._busy = False
        sys.addaudithook(self._heard)

    def __enter__(self) -> OutsideWatch:
        self.seen = []
        return self

    def __exit__(self, *_) -> None:
        self.allowed = None

    def inside(self, folder: Path) -> OutsideWatch:
        """The watch, for a scope in which this folder may be changed."""
        self.allowed = os.path.realpath(folder)
        return self

    def _heard(self, event: str, arguments: tuple) -> None:
        if self.allowed is None or self._busy:
            return
        self._busy = True
        try:
            for path in changed(event, arguments):
                # an open file follows a link, all else changes the name itself
                real = os.path.realpath(path)
                if event != "open":
                    real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
                if not f"{real}/".startswith((f"{self.allowed}/", "/dev/", "/proc/")):
                    self.seen.append(f"{event} {real}")
        finally:
            self._busy = False


def limit_files(size: int, *, deadly: bool) -> None:
    """No file of this process grows beyond `size` bytes from now on. deadly: the write that tries kills the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
