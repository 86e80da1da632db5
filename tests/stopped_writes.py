"""Writes that are stopped at one of their file operations, in a child process: it dies there, or the system refuses."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if not hasattr(os, "fork"):
    pytest.skip("processes are not forked here", allow_module_level=True)

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# how the child ended: to the end, dead, with an OSError that names the folder, with anything else
WHOLE, DEAD, REFUSED, WRONG = 0, 9, 3, 4


def stopped(write: Callable[[], object], folder: Path, at: int, how: str) -> int:
    """How a child process ends that runs `write` and is stopped at its file operation number `at`, from 1.

    how: "killed", or "full": the operation, and all later ones, end as on a full disk.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        _strike(folder, at, how)
        write()
        code = WHOLE
    except OSError as error:
        code = REFUSED if str(folder) in str(error) else WRONG
    except BaseException:
        code = WRONG
    os._exit(code)


def _strike(folder: Path, at: int, how: str) -> None:
    seen = 0

    def heard(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in _EVENTS or (
            event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING)
        ):
            return
        if not str(arguments[0]).startswith(str(folder)) and event == "open":
            return
        seen += 1
        if seen == at and how == "killed":
            os._exit(DEAD)
        # what takes no room succeeds on a full disk
        if seen >= at and how == "full" and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    # a hook cannot be taken out again, but its process ends
    sys.addaudithook(heard)
