"""The processes that torchrun or accelerate has started for one command: they meet, speak once, and end alike.

They talk through the launcher's store of keys and values, which works before the process group is there and after it is
broken.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lofit_fast.launch import Launch, by_itself, launched

# seconds until all have joined; a machine of a cluster may load its libraries for minutes
JOIN_SECONDS = 300.0
_JOIN_VARIABLE = "LOFIT_FAST_JOIN_SECONDS"
# what another process, which knows more, is given to say first
_PATIENCE = 3.0
# until the others have ended too, once this one has
_LAST_SECONDS = 30.0
_LIBRARIES = ("lofit-fast", "torch", "transformers", "accelerate", "trl", "datasets", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Across:
    """What a command does as several processes. all_work: or only the first, while the others wait for it.

    said: in --help. refusal: why it cannot be started so, or None.
    """

    said: str
    all_work: bool = False
    refusal: str | None = None


DIVIDED = Across("Under torchrun or accelerate launch the processes divide the work.", all_work=True)
FIRST = Across("Under torchrun or accelerate launch one process does the work, and the others wait for it.")


def refused(reason: str) -> Across:
    """Of a command that several processes cannot do together. reason: goes on after "... is refused: "."""
    return Across(f"Under torchrun or accelerate launch it is refused: {reason}.", refusal=reason)


@dataclass
class Company:
    """This process by itself, or one of those of a launch. works: whether it does what the command is for."""

    launch: Launch | None = None
    store: Any = None
    works: bool = True
    divided: bool = False
    _left: bool = field(default=False, repr=False)

    @contextmanager
    def at_work(self, device: str) -> Iterator[None]:
        """A scope with the process group that a divided command needs, or without a sign of other processes.

        device: the command's, by name.
        """
        if self.launch is None:
            yield
        elif self.divided:
            with _group(self.launch, self.store, device):
                yield
        else:
            with by_itself():
                yield

    def speaks(self, elsewhere: bool) -> bool:
        """Whether it is this process that says what has gone wrong: of all of them one does, the first if it can.

        elsewhere: whether its error tells of another's, which knows more.
        """
        if self.launch is None or self.store is None:
            return True
        with _broken_as(True) as answer:
            self.store.set(f"failed/{self.launch.rank}", "elsewhere" if elsewhere else "here")
            until = time.monotonic() + (0.0 if self.launch.rank == 0 and not elsewhere else _PATIENCE)
            while time.monotonic() < until and not self._has("spoken"):
                if not elsewhere and self._has("failed/0") and self.store.get("failed/0") == b"elsewhere":
                    break
                time.sleep(0.02)
            answer.value = self.store.add("spoken", 1) == 1
        return answer.value

    def gone(self) -> str | None:
        """Which processes of this machine have ended, in words; None if none is known to have."""
        if self.launch is None or self.store is None:
            return None
        with _broken_as([]) as answer:
            keys = [f"hello/{rank}" for rank in range(self.launch.count)]
            known = {rank: json.loads(self.store.get(key)) for rank, key in enumerate(keys) if self._has(key)}
            answer.value = [rank for rank, other in known.items() if _has_ended(other)]
        if not answer.value:
            return None
        several = len(answer.value) > 1
        numbers = ", ".join(map(str, answer.value))
        return f"process{'es' * several} {numbers} of {self.launch.count} {'have' if several else 'has'} ended"

    def named(self, message: str) -> str:
        """A message with the number of the process that has something to say, where it is not the first."""
        if self.launch is None or self.store is None or self.launch.rank == 0:
            return message
        return f"process {self.launch.rank} of {self.launch.count}: {message}"

    def ended(self, code: int) -> int:
        """The exit code of all of them, once each has one: its own, or that of another that has failed."""
        if self.launch is None or self.store is None or self._left:
            return code
        self._left = True
        with _broken_as(code) as answer:
            self.store.set(f"end/{self.launch.rank}", str(code))
            # the first may take hours for what it does alone; its end takes the store with it, or the launcher acts
            if self.launch.rank and not code:
                self._wait(["end/0"], None)
            others = [f"end/{rank}" for rank in range(self.launch.count)]
            self._wait(others, _LAST_SECONDS if not code else _PATIENCE)
            codes = [int(self.store.get(key)) for key in others if self._has(key)]
            answer.value = code or next((other for other in codes if other), 0)
            # the store lives no longer than its keeper
            if self.launch.rank:
                self.store.set(f"left/{self.launch.rank}", "")
            else:
                self._wait([f"left/{rank}" for rank in range(1, self.launch.count)], _PATIENCE)
        return answer.value

    def _has(self, key: str) -> bool:
        return bool(self.store.check([key]))

    def _wait(self, keys: list[str], seconds: float | None) -> None:
        until = None if seconds is None else time.monotonic() + seconds
        while not self.store.check(keys) and (until is None or time.monotonic() < until):
            time.sleep(0.02)


def joined(across: Across, company: Company, limit: float | None = None) -> None:
    """Make `company` the one of this launch, if there is one. limit: seconds until all have joined.

    Raises ValueError for variables that do not fit together, processes of other versions or commands, and a command
    that is refused; OSError for a port that is in use, TimeoutError naming the processes that have not joined.
    """
    company.launch = launched()
    if company.launch is None:
        return
    limit = float(os.environ.get(_JOIN_VARIABLE) or JOIN_SECONDS) if limit is None else limit
    store = _store(company.launch, limit)
    mine = {"host": socket.gethostname(), "process": os.getpid(), "versions": _versions(), "command": sys.argv[1:]}
    _take_place(company.launch, store, mine)
    company.store = store
    _check_alike(_introduced(company.launch, store, limit))
    if across.refusal is not None:
        raise ValueError(f"expected one process for this command, got {company.launch.count}: {across.refusal}")
    company.divided = across.all_work
    company.works = across.all_work or company.launch.rank == 0


def _store(launch: Launch, limit: float) -> Any:
    from torch.distributed import PrefixStore, TCPStore

    place = f"{launch.address}:{launch.port}"
    try:
        store = TCPStore(
            launch.address,
            launch.port,
            launch.count,
            is_master=launch.rank == 0 and not launch.kept,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            said = f"another program uses {place}: expected a free port (--master-port of torchrun, MASTER_PORT)"
            raise OSError(errno.EADDRINUSE, said) from error
        if launch.rank and not launch.kept:
            raise TimeoutError(
                f"process 0 of {launch.count} has not joined: nobody answers at {place} for {limit:.0f} s"
            ) from error
        raise OSError(f"cannot join the other processes at {place}: {str(error).splitlines()[0]}") from error
    return PrefixStore(f"lofit-fast/{launch.attempt}", store)


def _take_place(launch: Launch, store: Any, mine: Mapping[str, Any]) -> None:
    """Raise ValueError where another process has this one's number: of another launch, say, with the same port."""
    text = json.dumps(mine)
    if (found := store.compare_set(f"hello/{launch.rank}", "", text).decode()) != text:
        other = json.loads(found)
        raise ValueError(
            f"process {launch.rank} of {launch.count} at {launch.address}:{launch.port} is process {other['process']} on "
            f"{other['host']} already: expected a port of its own for each launch (--master-port, MASTER_PORT)"
        )


def _introduced(launch: Launch, store: Any, limit: float) -> list[Mapping[str, Any]]:
    """What all processes say of themselves. Raises TimeoutError that names those that are not there in time."""
    missing, until = list(range(launch.count)), time.monotonic() + limit
    while missing := [rank for rank in missing if not store.check([f"hello/{rank}"])]:
        if time.monotonic() > until:
            listed, some = ", ".join(map(str, missing)), len(missing) > 1
            raise TimeoutError(
                f"process{'es' * some} {listed} of {launch.count} {'have' if some else 'has'} not joined within "
                f"{limit:.0f} s ({_JOIN_VARIABLE}): each must run the same command, and none may have ended"
            )
        time.sleep(0.02)
    return [json.loads(store.get(f"hello/{rank}")) for rank in range(launch.count)]


def _check_alike(processes: list[Mapping[str, Any]]) -> None:
    first = processes[0]
    for rank, other in enumerate(processes):
        for library, its in other["versions"].items():
            if its != first["versions"].get(library):
                raise ValueError(
                    f"expected the same libraries in every process: process 0 on {first['host']} has {library} "
                    f"{first['versions'].get(library)}, process {rank} on {other['host']} has {its}"
                )
        if other["command"] != first["command"]:
            raise ValueError(
                f"expected the same command in every process: process 0 on {first['host']} runs "
                f"{' '.join(first['command'])!r}, process {rank} on {other['host']} runs {' '.join(other['command'])!r}"
            )


def _has_ended(other: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is not there any more; of another machine that is not known."""
    if other["host"] != socket.gethostname():
        return False
    try:
        os.kill(other["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        # ended, and nobody has asked how
        return Path(f"/proc/{other['process']}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found


@contextmanager
def _group(launch: Launch, store: Any, device: str) -> Iterator[None]:
    """A scope with the process group, each process with a GPU of its own where they compute on GPUs."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() if device == "auto" or device.startswith("cuda") else 0
    if device.startswith("cuda:"):
        raise ValueError(
            f"--device {device} is one device for {launch.count} processes: expected cuda, of which each takes its own"
        )
    if gpus:
        if launch.local_rank >= gpus:
            raise ValueError(
                f"{launch.local_count} processes on {socket.gethostname()}, which has {gpus} GPUs: expected "
                f"--nproc-per-node {gpus} or fewer, or --device cpu"
            )
        torch.cuda.set_device(launch.local_rank)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.count)
    try:
        yield
    finally:
        # after an error the others may be gone, and what they hold back is not waited for
        with suppress(Exception):
            dist.destroy_process_group()


@dataclass
class _Answer:
    value: Any


@contextmanager
def _broken_as(value: Any) -> Iterator[_Answer]:
    """A scope whose answer is `value` unless it gives another, also where the store has gone with its keeper."""
    answer = _Answer(value)
    # torch's errors of a store are RuntimeErrors
    with suppress(RuntimeError):
        yield answer


def hush() -> None:
    """Let all but the first process of a launch print nothing: what they say they say as `speaking`."""
    try:
        launch = launched()
    except ValueError:
        return
    if launch is not None and launch.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def speaking() -> Iterator[None]:
    """A scope in which also a process that was hushed prints."""
    kept = sys.stdout, sys.stderr
    if getattr(sys.stderr, "name", None) == os.devnull:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept
