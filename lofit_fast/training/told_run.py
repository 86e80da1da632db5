"""A run folder of several processes: the first one holds and writes it, and tells the others what is in it."""

from __future__ import annotations

import inspect
import logging
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import transformers

from lofit_fast import ranks
from lofit_fast.files import writable_folder
from lofit_fast.training.run_folder import RunFolder

# seconds after which a file that one process has written is to be seen by all: file systems of a network keep others'
# folders for a while
_SEEN_WITHIN = 10.0
_LOOK = 0.05


class ToldRun:
    """A `RunFolder` as every process of a run has it. All of them must ask it for the same, in the same order.

    What it answers is what the first process reads; what is written, that one writes.
    """

    def __init__(self, path: Path, held: RunFolder | None) -> None:
        self.path, self._held = path, held

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        kind = inspect.getattr_static(RunFolder, name)
        if inspect.isfunction(kind):
            return lambda *args, **options: self._told(name, args, options)
        return ranks.told(lambda: getattr(self._held, name))

    def _told(self, name: str, args: tuple, options: Mapping[str, object]) -> object:
        given = [arg._held if isinstance(arg, ToldRun) else arg for arg in args]
        return ranks.told(lambda: getattr(self._held, name)(*given, **options))


@contextmanager
def opened(path: Path | str, identity: Mapping[str, object], resume: bool, **how) -> Iterator[RunFolder | ToldRun]:
    """`RunFolder.open` for all processes of a run; alone it is that very folder. Arguments and errors are the same.

    Raises OSError, in every process, for a folder that not all of them see.
    """
    path = Path(path)
    if ranks.count() == 1:
        with RunFolder.open(path, identity, resume, **how) as run:
            yield run
        return
    ranks.told(lambda: RunFolder(path)._look() and None)
    check_seen_by_all(path)
    with ExitStack() as scopes:
        held: list[RunFolder] = []
        ranks.by_first(lambda: held.append(scopes.enter_context(RunFolder.open(path, identity, resume, **how))))
        yield ToldRun(path, held[0] if held else None)


def check_seen_by_all(path: Path) -> None:
    """Raise OSError, naming machines, unless every process sees in a folder what the first one has written there."""
    made: list[Callable[[], None]] = []

    def write() -> str:
        there = path.exists()
        token = writable_folder(path) / f".lofit-seen-{secrets.token_hex(8)}"
        token.touch()
        made.append(lambda: _taken_away(token, not there))
        return token.name

    name = ranks.told(write)
    # one that has been told of a file sees it at once, or when its file system looks again
    seen = ranks.gathered((_seen(path / name), socket.gethostname()))
    for take_away in made:
        take_away()
    blind = [f"process {number} on {host}" for number, (found, host) in enumerate(seen) if not found]
    if blind:
        raise OSError(
            f"{path} is not the same folder for all processes: {', '.join(blind)} cannot see what process 0 on "
            f"{seen[0][1]} has written there; expected one on a file system that they share"
        )


def _seen(path: Path) -> bool:
    until = time.monotonic() + _SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        # asking for the folder's names makes a file system of a network look again
        with suppress(OSError):
            list(path.parent.iterdir())
        time.sleep(_LOOK)
    return True


def _taken_away(token: Path, folder_too: bool) -> None:
    token.unlink(missing_ok=True)
    if folder_too:
        with suppress(OSError):
            token.parent.rmdir()


@contextmanager
def quiet_unless_first() -> Iterator[None]:
    """A scope in which all processes but the first keep warnings and what libraries log to themselves."""
    if ranks.first():
        yield
        return
    ours, theirs = logging.getLogger("lofit_fast"), transformers.logging
    before, verbosity = ours.level, theirs.get_verbosity()
    ours.setLevel(logging.ERROR)
    theirs.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        ours.setLevel(before)
        theirs.set_verbosity(verbosity)
