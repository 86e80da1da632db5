"""The processes of one run: which of them this is, and what they say to each other.

A rank is a process's number among those that torchrun or accelerate has started for one run, from 0. Where there is one
process all of this costs nothing: it is the first, what it is told is its own, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


class ElsewhereError(RuntimeError):
    """Another process of the run has failed: it is named, with what it said."""


def count() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


def gathered(value: Value) -> list[Value]:
    """Every process's value, by rank, in every process. All of them must call it."""
    if count() == 1:
        return [value]
    values: list = [None] * count()
    dist.all_gather_object(values, value)
    return values


def told(make: Callable[[], Value]) -> Value:
    """What the first process makes, in every process. All of them must call it; what it raises, all of them raise.

    The others wait meanwhile, and make nothing.
    """
    if count() == 1:
        return make()
    said: list = [None, None]
    if first():
        try:
            said[0] = make()
        except Exception as error:
            said[1] = error
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise said[1]
    return said[0]


@contextmanager
def together(what: str) -> Iterator[None]:
    """A scope that every process leaves in the same way: an error in one of them is raised in all.

    what: what is done inside, as in "reading the data". The process that failed raises its own error, the others an
    `ElsewhereError` that names it. Nothing may be sent inside that another process, having failed, would not receive.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    words = gathered(None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    wrong = [(number, said) for number, said in enumerate(words) if said is not None]
    if wrong:
        number, said = wrong[0]
        raise ElsewhereError(f"process {number} of {len(words)} failed in {what}: {said}")


def check_same(value: object, what: str) -> None:
    """Raise ValueError in every process where they have different values, naming who has which. what: in words."""
    values = gathered(value)
    if any(other != values[0] for other in values[1:]):
        listed = "; ".join(f"process {number}: {other}" for number, other in enumerate(values))
        raise ValueError(f"expected the same {what} in every process, got {listed}")
