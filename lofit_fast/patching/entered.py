"""What a thread, or a task of an event loop, has entered and not left: the context variable behind all scopes."""

import threading
from contextvars import ContextVar


class Entered:
    """A scope that was entered. owner: whose it is. says: what it says; None once it was left, wherever that was.

    scope: False of what was said for good, in no scope of its own.
    """

    __slots__ = ("__weakref__", "owner", "says", "scope", "thread")

    def __init__(self, owner: object, says: object, scope: bool = True) -> None:
        self.owner, self.says, self.scope = owner, says, scope
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


def say(owner: object, says: object | None) -> Entered | None:
    """Say something here from now on, until it is said anew: what all scopes are inside of. None takes it back."""
    others = tuple(one for one in _still_open() if one.owner is not owner or one.scope)
    said = None if says is None else Entered(owner, says, scope=False)
    _ENTERED.set(others if said is None else (said, *others))
    return said


def all_entered() -> tuple[Entered, ...]:
    """All that was entered here, of every owner, the innermost last; what was left elsewhere says None."""
    return _ENTERED.get()


def around(owner: object) -> list:
    """What the scopes around say for an owner, the innermost last."""
    return [says for one in _ENTERED.get() if one.owner is owner and (says := one.says) is not None]


def _still_open() -> tuple[Entered, ...]:
    return tuple(one for one in _ENTERED.get() if one.says is not None)
