"""Scopes that hold for whoever has entered them: one thread, or one task of an event loop, and nobody else.

What was entered stands in a context variable, which is what counts. A forward that is compiled cannot read one, so each
thread is shown what its scopes say: `Here`, which a layer looks at without a call. It is put right before every forward
of the model, and where tasks take turns in a thread, before every forward of a layer.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lofit_kernels.layer_fold import Folded


class Entered:
    """A scope that was entered. owner: whose it is. says: what it says; None once it was left, wherever that was."""

    __slots__ = ("owner", "says", "thread")

    def __init__(self, owner: object, says: object) -> None:
        self.owner, self.says = owner, says
        self.thread = threading.get_ident()


# all that was entered and not left, of every owner, the innermost last
_ENTERED: ContextVar[tuple[Entered, ...]] = ContextVar("lofit_scopes", default=())


def enter(owner: object, says: object) -> Entered:
    """Enter a scope here. It holds until it is given to `leave`, in copies of this context too."""
    entered = Entered(owner, says)
    _ENTERED.set((*_still_open(), entered))
    return entered


def leave(entered: Entered) -> None:
    """Leave a scope, in whatever order, thread or task: no token of a context variable, which knows one order alone."""
    entered.owner = entered.says = None
    _ENTERED.set(_still_open())


def around(owner: object) -> list:
    """What the scopes around say for an owner, the innermost last."""
    return [says for one in _ENTERED.get() if one.owner is owner and (says := one.says) is not None]


def _still_open() -> tuple[Entered, ...]:
    return tuple(one for one in _ENTERED.get() if one.says is not None)


class Here(threading.local):
    """What holds for one layer in the thread that asks.

    off: whether the base alone is computed. kept: W v for forwards without gradients, (N,), inside `folded`. folded,
    ready: what a fold of the whole model has left for the forward that goes on, W v (N,) and the same ready for its
    projection; ready is None where a forward is compiled.
    """

    def __init__(self) -> None:
        # of each thread anew, and there before a compiler looks: what appears while it does ends its graph
        self.off = False
        self.kept: Tensor | None = None
        self.folded: Tensor | None = None
        self.ready: Folded | None = None

    def __reduce__(self) -> tuple:
        # a copy is in no scope, and in no forward
        return Here, ()


class Fixed:
    """`Here` of a replica, which threads of its own run: what held where it was made. Its tensors are its own."""

    kept = folded = ready = None

    def __init__(self, off: bool) -> None:
        self.off = off


@dataclass(frozen=True)
class Says:
    """What a scope says. off: the base alone. folds: W v of each layer. alone: scopes around do not count."""

    off: bool = False
    folds: tuple[Tensor | None, ...] | None = None
    alone: bool = False


class Foldable(Protocol):
    """A layer that can compute its W v."""

    def fold(self) -> Tensor | None:
        """(N,), or None where a forward computes its own."""


_Said = tuple[bool, tuple[Tensor | None, ...] | None]


class _Shown(threading.local):
    """What this thread's places show: (off, folds).

    inside: whether a forward of the model goes on. before: what they showed before it, if that was other.
    """

    def __init__(self) -> None:
        self.now: _Said = (False, None)
        self.before: _Said | None = None
        self.inside = False


class Scopes:
    """What the layers of one handle share: who is in which of its scopes.

    places: what each layer looks at. asks: whether layers must look themselves before each forward, which they do where
    tasks of an event loop may have taken turns since.
    """

    def __init__(self, places: Sequence[Here] = ()) -> None:
        self.places = tuple(places)
        self.asks = False
        # the collector of garbage may leave a scope of a generator right here, while this thread holds the lock
        self._lock = threading.RLock()
        # each with whether an event loop ran
        self._open: dict[Entered, bool] = {}
        # threads whose scope another thread has left
        self._stale: set[int] = set()
        # threads that are shown a scope which another has entered, and which does not tell them that it is left
        self._borrowing: set[int] = set()
        self._shown = _Shown()
        self._hooks: tuple[RemovableHandle, ...] = ()

    def __getstate__(self) -> dict:
        # a copy is in no scope; its hooks are those of the copied decoder
        return {"places": self.places, "hooks": self._hooks}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["places"])
        self._hooks = state["hooks"]

    def watch(self, decoder: nn.Module) -> None:
        """Look before each forward of a decoder, until `remove`."""
        self._hooks = (
            decoder.register_forward_pre_hook(self._before_forward, prepend=True),
            decoder.register_forward_hook(self._after_forward, always_call=True),
        )

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A scope in which layers compute what their base computes."""
        with self._in(Says(off=True)):
            yield

    @contextmanager
    def folded(self, layers: Sequence[Foldable]) -> Iterator[None]:
        """A scope in which forwards without gradients reuse each layer's W v. layers: in the order of the places."""
        _, folds = self._said()
        # one inside another goes on with what is there
        with self._in(Says(folds=tuple(layer.fold() for layer in layers) if folds is None else folds)):
            yield

    @contextmanager
    def again(self, off: bool) -> Iterator[None]:
        """A scope in which the layers are off, or not, whatever scopes are around: for the second run of a forward."""
        if self.off == off:
            yield
            return
        with self._in(Says(off=off, alone=True)):
            yield

    @property
    def off(self) -> bool:
        """Whether the base alone is computed here."""
        return self._said()[0]

    @property
    def plain(self) -> bool:
        """Whether no scope is around: neither the base alone nor what was folded is computed with."""
        return self._said() == (False, None)

    def folding(self) -> bool:
        """Whether anybody, in any thread, computes with what was folded."""
        with self._lock:
            return any(says.folds is not None for one in list(self._open) if (says := one.says) is not None)

    def check_alone(self, action: str) -> None:
        """Raise ValueError while another thread or task is inside a scope. action: what would change its answers."""
        mine = _ENTERED.get()
        with self._lock:
            others = [one for one in list(self._open) if one not in mine]
        if others:
            raise ValueError(
                f"cannot {action}: another thread or task is inside handle.disabled() or handle.folded(), and its "
                "answers would change: let it leave first"
            )

    def look(self) -> None:
        """Show this thread what the scopes around say."""
        # inside of a forward it was done; elsewhere the context variable ends the graph, which is slow and right
        if torch.compiler.is_compiling() and self._shown.inside:
            return
        said = self._said()
        self._show(*said)
        if said != (False, None) and any(one.thread != threading.get_ident() for one in _ENTERED.get()):
            self._borrowing.add(threading.get_ident())
        if self._stale:
            with self._lock:
                self._stale.discard(threading.get_ident())
                self._count()

    @contextmanager
    def _in(self, says: Says) -> Iterator[None]:
        entered = enter(self, says)
        try:
            with self._lock:
                self._open[entered] = _in_a_loop()
                self._count()
            self.look()
            yield
        finally:
            leave(entered)
            with self._lock:
                self._open.pop(entered, None)
                if entered.thread != threading.get_ident():
                    self._stale.add(entered.thread)
                self._stale |= self._borrowing
                self._borrowing.clear()
                self._count()
            self.look()

    def _count(self) -> None:
        if self._stale:
            # a thread that has ended looks no more
            self._stale &= {thread.ident for thread in threading.enumerate()}
        self.asks = bool(self._stale) or any(self._open.values())

    def _said(self) -> _Said:
        """(off, folds) of all scopes around."""
        off, folds = False, None
        for says in around(self):
            if says.alone:
                off, folds = False, None
            off = off or says.off
            folds = says.folds if folds is None else folds
        return off, folds

    def _show(self, off: bool, folds: tuple[Tensor | None, ...] | None) -> None:
        shown = self._shown
        if shown.now[0] is off and shown.now[1] is folds:
            return
        for place, fold in zip(self.places, folds or [None] * len(self.places), strict=True):
            place.off, place.kept = off, fold
        shown.now = (off, folds)

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        # a graph is guarded by what is shown to the thread that runs it
        if torch.compiler.is_compiling():
            return
        shown = self._shown
        shown.before, shown.inside = None, True
        if self._open or self._stale or shown.now != (False, None):
            # with no scope anywhere, or one that another thread has left, what was shown is no more
            now, out_of_date = shown.now, not self._open or threading.get_ident() in self._stale
            self.look()
            # a context that was made elsewhere, as of a task: what runs here outside of it is not in its scopes
            shown.before = None if out_of_date or shown.now is now else now

    def _after_forward(self, module: nn.Module, args: tuple, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        shown = self._shown
        shown.inside = False
        if shown.before is not None:
            self._show(*shown.before)
            shown.before = None
            if shown.now == (False, None):
                self._borrowing.discard(threading.get_ident())


def _in_a_loop() -> bool:
    """Whether an event loop runs in this thread, whose tasks may take turns inside a scope."""
    loops = sys.modules.get("asyncio")
    if loops is None:
        return False
    try:
        loops.get_running_loop()
    except RuntimeError:
        return False
    return True
