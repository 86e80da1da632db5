"""Scopes that hold for whoever has entered them: one thread, or one task of an event loop, and nobody else.

What was entered stands in a context variable (`entered.py`), which is what counts. A forward that is compiled cannot
read one, so each thread is shown what its scopes say: `Here`, which a layer looks at without a call. It is put right
before every forward of the model, and where tasks take turns in a thread, before every forward of a layer.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lofit_fast.patching.entered import Entered, all_entered, around, enter, leave, say

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lofit_fast.patching.chosen_adapters import Chosen
    from lofit_fast.patching.early_fold import EarlyFold


# what runs forwards of a model in a thread of its own
_BATCHING = "transformers.generation.continuous_batching"


class Here(threading.local):
    """What holds for one layer in the thread that asks.

    off: whether the base alone is computed. kept: W v for forwards without gradients, inside `folded`. chosen: adapters
    other than the handle's own, of all rows or each. folded: W v that a fold of the whole model has left for the
    forward that goes on.
    """

    def __init__(self) -> None:
        # of each thread anew, and there before a compiler looks: what appears while it does ends its graph
        self.off = False
        self.kept: EarlyFold | None = None
        self.chosen: Chosen | None = None
        self.folded: EarlyFold | None = None

    def __reduce__(self) -> tuple:
        # a copy is in no scope, and in no forward
        return Here, ()


class Fixed:
    """`Here` of a replica, which threads of its own run: what held where it was made. Its tensors are its own."""

    kept = folded = chosen = None

    def __init__(self, off: bool) -> None:
        self.off = off


@dataclass(frozen=True)
class Says:
    """What a scope says. off: the base alone. folds: W v by the place of each layer. chosen: other adapters.

    alone: scopes around do not count.
    """

    off: bool = False
    folds: Mapping[Here, EarlyFold | None] | None = None
    chosen: Chosen | None = None
    alone: bool = False


class Foldable(Protocol):
    """A layer that can compute its W v. here: its place."""

    here: Here

    def fold(self) -> EarlyFold | None:
        """None where a forward computes its own."""


class Said(NamedTuple):
    """What all scopes around say together."""

    off: bool = False
    folds: Mapping[Here, EarlyFold | None] | None = None
    chosen: Chosen | None = None


# outside of all scopes
_PLAIN = Said()


class _Shown(threading.local):
    """What this thread's places show.

    inside: whether a forward of the model goes on. before: what they showed before it, if that was other.
    """

    def __init__(self) -> None:
        self.now = _PLAIN
        self.before: Said | None = None
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
        # what was said for good, as long as some context has it, with the same
        self._for_good: WeakKeyDictionary[Entered, bool] = WeakKeyDictionary()
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
        """Take the hooks off the decoder, and back what was said for good, wherever."""
        for hook in self._hooks:
            hook.remove()
        for one in list(self._for_good):
            one.owner = one.says = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A scope in which layers compute what their base computes."""
        with self._in(Says(off=True)):
            yield

    @contextmanager
    def folded(self, layers: Sequence[Foldable]) -> Iterator[None]:
        """A scope in which forwards without gradients reuse each layer's W v. layers: those of the places."""
        folds = self.said().folds
        # one inside another goes on with what is there
        with self._in(Says(folds={layer.here: layer.fold() for layer in layers} if folds is None else folds)):
            yield

    @contextmanager
    def choosing(self, chosen: Chosen) -> Iterator[None]:
        """A scope in which other adapters are computed with."""
        with self._in(Says(chosen=chosen)):
            yield

    def choose(self, chosen: Chosen | None) -> None:
        """The same from now on in this thread or task; None takes it back."""
        said = say(self, None if chosen is None else Says(chosen=chosen))
        with self._lock:
            if said is not None:
                self._for_good[said] = _in_a_loop()
            self._count()
        self.look()

    def for_good(self) -> Chosen | None:
        """What `choose` has said here."""
        own = (one.says for one in all_entered() if one.owner is self and not one.scope)
        return next((says.chosen for says in own if says is not None), None)

    @contextmanager
    def again(self, said: Said) -> Iterator[None]:
        """A scope in which layers are off, or have what was chosen, as was said: for the second run of a forward."""
        now = self.said()
        if now.off == said.off and now.chosen is said.chosen:
            yield
            return
        with self._in(Says(off=said.off, chosen=said.chosen, alone=True)):
            yield

    @property
    def off(self) -> bool:
        """Whether the base alone is computed here."""
        return self.said().off

    @property
    def plain(self) -> bool:
        """Whether no scope is around: neither the base alone, nor what was folded or chosen, is computed with."""
        return self.said() == _PLAIN

    def choices(self) -> list[Chosen]:
        """What anybody, in any thread, has chosen."""
        with self._lock:
            entered = [one.says for one in (*self._open, *self._for_good)]
        return [says.chosen for says in entered if says is not None and says.chosen is not None]

    def add(self, place: Here) -> None:
        """Show one more layer what scopes say, from the next one on."""
        self.places = (*self.places, place)

    def folding(self) -> bool:
        """Whether anybody, in any thread, computes with what was folded."""
        with self._lock:
            return any(says.folds is not None for one in list(self._open) if (says := one.says) is not None)

    def check_alone(self, action: str) -> None:
        """Raise ValueError while another thread or task is inside a scope. action: what would change its answers."""
        mine = all_entered()
        with self._lock:
            others = [one for one in list(self._open) if one not in mine]
        if others:
            raise ValueError(
                f"cannot {action}: another thread or task is inside handle.disabled(), handle.folded() or "
                "handle.rows(), and its answers would change: let it leave first"
            )

    def look(self) -> None:
        """Show this thread what the scopes around say."""
        # inside of a forward it was done; elsewhere the context variable ends the graph, which is slow and right
        if torch.compiler.is_compiling() and self._shown.inside:
            return
        said = self.said()
        self._show(said)
        if said != _PLAIN and any(one.thread != threading.get_ident() for one in all_entered()):
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
        self.asks = bool(self._stale) or any(self._open.values()) or any(list(self._for_good.values()))

    def said(self) -> Said:
        """What all scopes around say. Of the adapters that they choose, those of the innermost count."""
        off, folds, chosen = _PLAIN
        for says in around(self):
            if says.alone:
                off, folds, chosen = _PLAIN
            off = off or says.off
            folds = says.folds if folds is None else folds
            chosen = chosen if says.chosen is None else says.chosen
        return Said(off, folds, chosen)

    def _show(self, said: Said) -> None:
        now = self._shown.now
        if now.off is said.off and now.folds is said.folds and now.chosen is said.chosen:
            return
        for place in self.places:
            place.off, place.chosen = said.off, said.chosen
            # a layer that came later folds for itself
            place.kept = None if said.folds is None else said.folds.get(place)
        self._shown.now = said

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        # a graph is guarded by what is shown to the thread that runs it
        if torch.compiler.is_compiling():
            return
        shown = self._shown
        shown.before, shown.inside = None, True
        somewhere = self._open or self._for_good
        if somewhere or self._stale or shown.now != _PLAIN:
            # with no scope anywhere, or one that another thread has left, what was shown is no more
            if somewhere and not around(self):
                self._check_no_errand()
            now, out_of_date = shown.now, not somewhere or threading.get_ident() in self._stale
            self.look()
            # a context that was made elsewhere, as of a task: what runs here outside of it is not in its scopes
            shown.before = None if out_of_date or shown.now is now else now

    def _check_no_errand(self) -> None:
        """Raise ValueError in the thread of transformers' continuous batching, while other threads have said something.

        It works for whoever has called `generate_batch`, and is in none of that one's scopes.
        """
        with self._lock:
            said = [one.says for one in (*self._open, *self._for_good)]
        if any(says is not None and (says.off or says.chosen is not None) for says in said) and _is_called_by(
            _BATCHING
        ):
            raise ValueError(
                "transformers' generate_batch computes in a thread of its own, where handle.disabled(), handle.rows() "
                "and handle.set_active() of other threads do not hold: leave them in all threads and make the adapter "
                "the handle's own (lofit_fast.load), or use model.generate, which stays in its thread"
            )

    def _after_forward(self, module: nn.Module, args: tuple, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        shown = self._shown
        shown.inside = False
        if shown.before is not None:
            self._show(shown.before)
            shown.before = None
            if shown.now == _PLAIN:
                self._borrowing.discard(threading.get_ident())


def _is_called_by(package: str) -> bool:
    """Whether code of a package is running in this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        if (frame.f_globals.get("__name__") or "").startswith(package):
            return True
        frame = frame.f_back
    return False


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
