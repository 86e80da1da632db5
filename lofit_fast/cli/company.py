"""The processes that torchrun or accelerate has started for one command: they meet, speak once, and end alike.

They talk through the launcher's store of keys and values, which works before the process group is there and after it is
broken.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lofit_fast.extras import shared_versions
from lofit_fast.launchers import TIMEOUT, Launched, launched, limit, meeting, meets, said_in_time, unlaunched

# seconds that another process, which knows more, is given to say what is wrong
_PATIENCE = 3.0
# until the others have ended too, once this one has
_LAST_SECONDS = 30.0
_LOOK = 0.02


@dataclass(frozen=True)
class Across:
    """What a command does as several processes.

    said: in --help. divided: whether all work, in one process group. each: whether all work, and what they do together
    is the command's own matter. Otherwise only the first works, and the others wait for it. refusal: why the command
    cannot be started so, or None.
    """

    said: str
    divided: bool = False
    each: bool = False
    refusal: str | None = None


DIVIDED = Across("Under torchrun or accelerate launch the processes divide the work.", divided=True)
FIRST = Across("Under torchrun or accelerate launch one process does the work, and the others wait for it.")
EACH = Across("Under torchrun or accelerate launch each process takes a share of the runs.", each=True)


def refused(reason: str) -> Across:
    """Of a command that several processes cannot do together. reason: a clause on why."""
    return Across(f"Under torchrun or accelerate launch it is refused: {reason}.", refusal=reason)


@dataclass
class Company:
    """This process by itself, or one of those of a launch, once they have met (`met`).

    here: the numbers of those on this machine. works: whether it does what the command is for. across: what the command
    does as several processes. lost: what has become of the first process while this one waited for it, or None.
    """

    launched: Launched | None = None
    store: Any = None
    here: tuple[int, ...] = ()
    works: bool = True
    across: Across = FIRST
    lost: str | None = None

    def meet(self, across: Across) -> None:
        """Find the others, if there are any.

        Raises ValueError for an environment that does not fit together, processes of other versions or commands, and a
        command that is refused; OSError for a port that is in use; TimeoutError naming those that have not joined.
        """
        found = launched()
        if found is None or found.count == 1:
            return
        self.launched = found
        if across.each and not meets():
            # such as srun's tasks, which nobody has told where
            self.across = across
            return
        store, mine = _store(found), _introduction()
        try:
            _take_place(found, store, mine)
            # from here on all hear what one says
            self.store = store
            with said_in_time(f"process {found.rank} of {found.count} waits for the others to join"):
                others = _introduced(found, store)
        # of torch, where the store goes with its keeper
        except RuntimeError as error:
            self.store = None
            raise ConnectionError(f"process 0 of {found.count} has ended while the others joined") from error
        _check_alike(others)
        self.here = tuple(rank for rank, other in enumerate(others) if other["host"] == mine["host"])
        if across.refusal is not None:
            raise ValueError(f"expected one process for this command, got {found.count}: {across.refusal}")
        self.across, self.works = across, across.divided or across.each or found.rank == 0

    @contextmanager
    def at_work(self, what: str, device: str) -> Iterator[None]:
        """A scope with the process group that a divided command needs, or without a sign of other processes.

        what: is done, in words. device: the command's, by name.
        """
        if self.launched is None or self.across.each:
            yield
            return
        if not self.across.divided:
            with unlaunched():
                yield
            return
        _check_devices(self.launched, device, self._chips)
        from lofit_fast.ranks import joined

        with joined(what):
            yield

    def speaks(self, elsewhere: bool) -> bool:
        """Whether it is this process that says what has gone wrong: of all of them one does, the first if it can.

        elsewhere: whether its error tells of another's, which knows more.
        """
        if self.launched is None or self.store is None:
            return True
        rank, spoken = self.launched.rank, True
        # where the store has gone with its keeper
        with suppress(RuntimeError):
            self.store.set(f"failed/{rank}", "elsewhere" if elsewhere else "here")
            until = time.monotonic() + (0.0 if rank == 0 and not elsewhere else _PATIENCE)
            while time.monotonic() < until and not self._has("spoken"):
                if not elsewhere and self._has("failed/0") and self.store.get("failed/0") == b"elsewhere":
                    break
                time.sleep(_LOOK)
            spoken = self.store.add("spoken", 1) == 1
        return spoken

    def named(self, message: str) -> str:
        """A message with the number of the process that has something to say, where it is not the first."""
        if self.launched is None or self.store is None or self.launched.rank == 0:
            return message
        return f"process {self.launched.rank} of {self.launched.count}: {message}"

    def ended(self, code: int) -> int:
        """The exit code of all of them, once each has one: its own, or that of another that has failed."""
        if self.launched is None or self.store is None:
            return code
        store, self.store = self.store, None
        if self.launched.rank and not code:
            # the first may take hours for what it does alone
            try:
                while not store.check(["end/0"]):
                    time.sleep(10 * _LOOK)
            except RuntimeError:
                self.lost = f"process 0 of {self.launched.count} has ended without a word"
                return 1
        with suppress(RuntimeError):
            code = _agreed(self.launched, store, code)
        return code

    def _chips(self, own: str) -> list[str]:
        """What the processes of this machine compute on, by name. own: what this one does."""
        self.store.set(f"chip/{self.launched.rank}", own)
        return [self.store.get(f"chip/{rank}").decode() for rank in self.here]

    def _has(self, key: str) -> bool:
        return bool(self.store.check([key]))


def _store(found: Launched) -> Any:
    # of a process that is gone it says pages of its own, where torch is not there yet
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import PrefixStore, TCPStore

    place, seconds = meeting(found), limit().total_seconds()
    where = f"{place.address}:{place.port}"
    try:
        store = TCPStore(
            place.address,
            place.port,
            found.count,
            is_master=found.rank == 0 and not place.kept,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            said = f"another program uses {where}: expected a free port (--master-port of torchrun, MASTER_PORT)"
            raise OSError(errno.EADDRINUSE, said) from error
        if found.rank and not place.kept:
            raise TimeoutError(
                f"process 0 of {found.count} has not joined: nobody answers at {where} within {seconds:.3g} s "
                f"({TIMEOUT})"
            ) from error
        raise OSError(f"cannot join the other processes at {where}: {str(error).splitlines()[0]}") from error
    return PrefixStore(f"lofit-fast/{place.attempt}", store)


def _introduction() -> dict[str, Any]:
    where = {"host": socket.gethostname(), "process": os.getpid()}
    return where | {"versions": shared_versions(), "command": sys.argv[1:]}


def _take_place(found: Launched, store: Any, mine: Mapping[str, Any]) -> None:
    """Raise ValueError where another process has this one's number: of another launch, say, with the same port."""
    text = json.dumps(mine)
    if (there := store.compare_set(f"hello/{found.rank}", "", text).decode()) != text:
        other = json.loads(there)
        raise ValueError(
            f"process {found.rank} of {found.count} has joined already: it is process {other['process']} on "
            f"{other['host']}. Expected a port of its own for each launch (--master-port of torchrun, MASTER_PORT)"
        )


def _introduced(found: Launched, store: Any) -> list[Mapping[str, Any]]:
    """What all processes say of themselves. Raises TimeoutError that names those that are not there in time."""
    seconds = limit().total_seconds()
    missing, until = list(range(found.count)), time.monotonic() + seconds
    while missing := [rank for rank in missing if not store.check([f"hello/{rank}"])]:
        if time.monotonic() > until:
            listed, some = ", ".join(map(str, missing)), len(missing) > 1
            raise TimeoutError(
                f"process{'es' * some} {listed} of {found.count} {'have' if some else 'has'} not joined within "
                f"{seconds:.3g} s ({TIMEOUT}): each must run the same command, and none may have ended"
            )
        time.sleep(_LOOK)
    return [json.loads(store.get(f"hello/{rank}")) for rank in range(found.count)]


def _check_alike(processes: list[Mapping[str, Any]]) -> None:
    first = processes[0]
    for rank, other in enumerate(processes):
        for library, its in other["versions"].items():
            if its != first["versions"].get(library):
                raise ValueError(
                    f"expected the same libraries in every process: process 0 on {first['host']} has {library} "
                    f"{first['versions'].get(library)}, process {rank} on {other['host']} has {library} {its}"
                )
        if other["command"] != first["command"]:
            raise ValueError(
                f"expected the same command in every process: process 0 on {first['host']} runs "
                f"{' '.join(first['command'])!r}, process {rank} on {other['host']} runs {' '.join(other['command'])!r}"
            )


def _check_devices(found: Launched, device: str, chips: Callable[[str], list[str]]) -> None:
    """Raise ValueError where the processes cannot have a device each.

    chips: what the processes of this machine compute on, given what this one does; all of them must ask.
    """
    if ":" in device:
        raise ValueError(
            f"--device {device} is one device for {found.count} processes: expected its name alone, of which each "
            "process takes the one with its own number"
        )
    if device == "cpu":
        return
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return
    from lofit_fast.models.device import name_of_chip

    # SLURM, say, may let each process see one of its own: the first, to all of them
    used = chips(name_of_chip(torch.device("cuda", found.local % gpus)))
    if len(set(used)) < len(used):
        raise ValueError(
            f"{len(used)} processes for the {len(set(used))} GPUs of {socket.gethostname()}: expected --nproc-per-node "
            f"{len(set(used))} or fewer, or --device cpu"
        )


def _agreed(found: Launched, store: Any, code: int) -> int:
    """The exit code, of this process or of another that has failed, once all have said theirs."""

    def wait(keys: list[str], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(_LOOK)

    store.set(f"end/{found.rank}", str(code))
    everybody = [f"end/{rank}" for rank in range(found.count)]
    wait(everybody, _PATIENCE if code else _LAST_SECONDS)
    codes = [int(store.get(key)) for key in everybody if store.check([key])]
    # the store lives no longer than its keeper
    if found.rank:
        store.set(f"left/{found.rank}", "")
    else:
        wait([f"left/{rank}" for rank in range(1, found.count)], _PATIENCE if code else 2 * _LAST_SECONDS)
    return code or next((other for other in codes if other), 0)


def hush() -> None:
    """Let all but the first process of a launch print nothing: what they say they say as `speaking`."""
    try:
        found = launched()
    except ValueError:
        return
    if found is not None and found.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def speaking() -> Iterator[None]:
    """A scope in which also a process that was hushed prints."""
    kept = sys.stdout, sys.stderr
    if getattr(sys.stderr, "name", None) == os.devnull:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = kept
