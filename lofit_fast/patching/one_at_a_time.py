"""What puts projections into a model or takes them out: one thread does at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
# two threads at once would both find a model unpatched, or a handle live, or a name free
CHANGING = threading.RLock()


def one_at_a_time(change: Callable[P, T]) -> Callable[P, T]:
    """A function that waits until no other of its kind runs, in whatever thread."""

    @wraps(change)
    def run(*args: P.args, **options: P.kwargs) -> T:
        with CHANGING:
            return change(*args, **options)

    return run
