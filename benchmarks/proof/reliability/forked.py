"""A call in a process of its own, forked from this one, which has imported everything: so 200 kills take minutes.

The child is killed by SIGKILL at a moment of its own processor time, which a busy machine does not shift.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# longer than any work here takes on a busy machine
DEADLINE = 300.0
_MOST_SAID = 60_000
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ended:
    """How a child has ended.

    status: its exit code, or minus the signal that killed it. value: what the call returned, as JSON gives it back.
    raised: the names of the exception's classes, its own first; empty where none was raised. message: of the exception.
    cpu: seconds of its processor time. killed: whether we killed it. hung: whether it was killed for taking too long.
    """

    status: int
    value: object
    raised: tuple[str, ...]
    message: str
    cpu: float
    killed: bool = False
    hung: bool = False

    @property
    def done(self) -> bool:
        """Whether the call returned."""
        return self.status == 0


class Child:
    """A forked process that makes one call."""

    def __init__(self, call: Callable[[], object], environment: dict[str, str] | None = None) -> None:
        self.reads, writes = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # newer Pythons warn where there are threads: the child computes with one of its own
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self.reads)
            # its threads are not forked
            os.environ.update({"TOKENIZERS_PARALLELISM": "false", **(environment or {})})
            _make(call, writes)
        os.close(writes)
        os.set_blocking(self.reads, False)

    def cpu(self) -> float:
        """Seconds of processor time so far, to a hundredth."""
        # the name in brackets may hold anything
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def ended(self, kill_at: float | None = None, deadline: float = DEADLINE, late: float = 0.0) -> Ended:
        """Wait for its end. kill_at: processor seconds after which it is killed. late: seconds that the kill waits."""
        until, killed, hung = time.monotonic() + deadline, False, False
        said = b""
        while True:
            said += self._heard()
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if not killed and kill_at is not None and self.cpu() >= kill_at:
                time.sleep(late)
                self.kill()
                killed = True
            if not killed and time.monotonic() > until:
                self.kill()
                killed = hung = True
            time.sleep(0.002)
        said += self._heard()
        os.close(self.reads)
        found = _parsed(said)
        code = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        return Ended(
            code, found.get("value"), tuple(found.get("raised", ())), found.get("message", ""), cpu, killed, hung
        )

    def _heard(self) -> bytes:
        try:
            return os.read(self.reads, _MOST_SAID)
        except BlockingIOError:
            return b""


def forked(
    call: Callable[[], object],
    *,
    kill_at: float | None = None,
    late: float = 0.0,
    deadline: float = DEADLINE,
    **environment: str,
) -> Ended:
    """`Child(call).ended(kill_at, ...)`. environment: variables of the child."""
    return Child(call, environment).ended(kill_at, deadline, late)


def _make(call: Callable[[], object], writes: int) -> None:
    """In the child: the call, and what is said of it. Never returns."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    code = 1
    try:
        content: dict[str, object] = {"value": call()}
        code = 0
    except BaseException as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        content = {"raised": names, "message": str(error)[:2000]}
    finally:
        try:
            os.write(writes, json.dumps(content, default=str).encode()[:_MOST_SAID])
        finally:
            os._exit(code)


def _parsed(said: bytes) -> dict:
    try:
        return json.loads(said)
    except ValueError:
        return {}
