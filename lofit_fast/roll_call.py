"""Who of a run's processes is still there: what a failing one leaves behind, and the names of those that are gone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

# seconds that a process which fails waits for the others to fail too, and those which are left for each other's word
_GRACE = 3.0
_LOOK = 0.02
_ROOM = 500
# in what gloo raises, which has no class of its own, and some of NCCL's
_BACKENDS = ("gloo", "nccl")


class ElsewhereError(RuntimeError):
    """Another process of the run has failed: it is named, with what it said."""


class RollCall:
    """What the processes of a run say of how they do, in the store where they have met: it needs nobody to answer.

    rank, count: of this process. what: what they do together. number: of the scopes so far, by which notes are told
    apart. inside: whether the scope is entered. lost: why the processes are no group any more, or None.
    """

    def __init__(self, rank: int, count: int, what: str, number: int) -> None:
        self.rank, self.count, self.what, self.number = rank, count, what, number
        self.inside, self.lost = False, None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The scope itself: notes in it who this process is."""
        self.inside = True
        with suppress(RuntimeError):
            self._note("who", f"{os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            self.inside = False

    def leave(self, error: BaseException) -> None:
        """This process fails: say so, and break the group unless all others fail too."""
        said = f"{type(error).__name__}: {error}"[:_ROOM]
        try:
            self._note("failed", said)
            others = None if self.lost else self._waited("failed")
        # whoever kept the notes is gone
        except RuntimeError:
            others = None
        if others is None or len(others) < self.count:
            self.lost = self.lost or said
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def broken_off(self, error: BaseException) -> ElsewhereError | None:
        """What names the process that a collective waited for in vain, outside of `ranks` too; None of other errors."""
        known = self.lost is not None or isinstance(error, ElsewhereError) or not isinstance(error, RuntimeError)
        said = str(error).lower()
        if known or not (isinstance(error, dist.DistError) or any(name in said for name in _BACKENDS)):
            return None
        return ElsewhereError(self.whom(error))

    def whom(self, error: Exception) -> str:
        """A sentence on who does not take part any more. error: torch's, of what could not be said."""
        said = self._named() or f"the others cannot be reached ({' '.join(str(error).split())[:_ROOM]})"
        self.lost = said
        again = "the run goes on from its last whole checkpoint when all of them are started again"
        return f"process {self.rank} of {self.count} cannot go on: {said}; {again}"

    def _named(self) -> str | None:
        try:
            self._note("here", "yes")
            here = self._waited("here", "failed")
            failed = self._said("failed")
            absent = [number for number in range(self.count) if number not in here and number not in failed]
            who = self._said("who")
        except RuntimeError:
            # it ran in the first process where the launcher has none of its own
            return None if self.rank == 0 else "process 0, where they meet, has ended"
        named = [f"process {number} failed in {self.what}: {failed[number]}" for number in sorted(failed)]
        gone = [f"process {n} ({who[n]}) " if n in who else f"process {n} " for n in absent]
        return "; ".join([*named, *(f"{one}has ended or does not answer" for one in gone)]) or None

    def _waited(self, *names: str) -> dict[int, str]:
        """Which processes have left a note of these names, once all have or some time has passed."""
        until = time.monotonic() + _GRACE
        while True:
            found = {number: word for name in names for number, word in self._said(name).items()}
            if len(found) == self.count or time.monotonic() > until:
                return found
            time.sleep(_LOOK)

    def _said(self, name: str) -> dict[int, str]:
        store = _store()
        keys = {number: self._key(name, number) for number in range(self.count)}
        return {number: store.get(key).decode() for number, key in keys.items() if store.check([key])}

    def _note(self, name: str, text: str) -> None:
        _store().set(self._key(name, self.rank), text)

    def _key(self, name: str, number: int) -> str:
        return f"lofit-fast/{self.number}/{name}/{number}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
