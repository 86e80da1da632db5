"""The command line as several processes of one launch, forked from the test: what each prints, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# seconds after which all are killed
_LIMIT = 240.0


class Ended(NamedTuple):
    """code: a process's exit code; out, err: what it has printed."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launched(
    n: int,
    *arguments: object,
    ranks: Sequence[int] | None = None,
    before: Callable[[int], object] = lambda rank: None,
    stdin: str = "",
    **variables: object,
) -> list[Ended]:
    """`lofit-fast` with the arguments in processes of a launch of n, with the variables that torchrun sets.

    ranks: which of the n are started; all by default. before: called first in each process, with its rank. stdin: what
    all of them have between them. variables: more of the environment; None takes one away.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / "in").write_text(stdin)
        shared = os.open(where / "in", os.O_RDONLY)
        children = {}
        for rank in range(n) if ranks is None else ranks:
            given = {"RANK": rank, "LOCAL_RANK": rank, "LOFIT_FAST_TIMEOUT_MINUTES": 0.5, **address, **variables}
            files = [shared, *(os.open(where / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY) for name in ("out", "err"))]
            children[rank] = _forked([str(a) for a in arguments], given, lambda rank=rank: before(rank), files)
        codes = {rank: _code(pid) for rank, pid in children.items()}
        said = {rank: [(where / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in codes}
        return [Ended(code, *said[rank]) for rank, code in codes.items()]


def _forked(arguments: list[str], given: dict, before: Callable[[], object], files: list[int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        for file in files[1:]:
            os.close(file)
        return pid
    code = 99
    try:
        for name, value in given.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, str(value))
        for number, file in enumerate(files):
            os.dup2(file, number)
        code = _called(arguments, before)
    finally:
        os._exit(code)


def _called(arguments: list[str], before: Callable[[], object]) -> int:
    import torch

    from lofit_fast.cli import main

    # pytest's stand-ins write elsewhere
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = os.fdopen(number, mode, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["lofit-fast", *arguments]
    torch.set_num_threads(1)
    try:
        before()
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        for stream in (sys.__stdout__, sys.__stderr__):
            stream.flush()
    return 0


def _code(pid: int) -> int:
    until = time.monotonic() + _LIMIT
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def error_of(ended, code=1):
    """The one line that all processes together print, where all end with the same code."""
    assert [one.code for one in ended] == [code] * len(ended), ended
    assert not any(one.out for one in ended)
    lines = [line for one in ended for line in one.err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")
