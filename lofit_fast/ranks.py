"""The processes of one run: which of them this is, and what they say to each other.

A rank is a process's number among those that torchrun or accelerate has started for one run, from 0. Where there is one
process all of this costs nothing: it is the first, what it is told is its own, and nothing is sent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lofit_fast.extras import shared_versions
from lofit_fast.files import same_json
from lofit_fast.launchers import join, launched
from lofit_fast.roll_call import ElsewhereError, RollCall

__all__ = ["ElsewhereError"]

Value = TypeVar("Value")

# of what an error holds: plain data, which is sent as it is
_SENT = (str, bytes, int, float, tuple, list, dict, Path, type(None))
# what the processes say of how they do; None before they have begun to
_calls: RollCall | None = None
_apart: ContextVar[bool] = ContextVar("lofit_fast_apart", default=False)


def count() -> int:
    """How many processes the run has."""
    if _apart.get():
        return 1
    if _is_lost():
        # whoever has lost the others is not the first of a run of one
        return _calls.count
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    if count() == 1:
        return 0
    return _calls.rank if _is_lost() else dist.get_rank()


def first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


def begun() -> None:
    """Join the processes that torchrun or accelerate has started this one with. Does nothing where there are none.

    On CUDA each process takes the device of its local number. A second call does nothing, and a group that somebody
    else has made is taken as it is.
    Raises OSError where a port is in use or the others do not come, ElsewhereError after one of them has been lost.
    """
    if _apart.get():
        return
    _check_not_lost()
    found = launched()
    if found is not None and found.count > 1 and not dist.is_initialized():
        join(found)


@contextmanager
def joined(what: str) -> Iterator[None]:
    """A scope that the processes of a run are in together: an error that ends it in one ends it in all.

    what: what is done inside, as in "training". A process that fails says so before it goes, so that the others end
    at once, with an `ElsewhereError` that names it, and do not wait. Afterwards they are no group any more, unless all
    have failed.
    """
    global _calls
    begun()
    if count() == 1 or (_calls is not None and _calls.inside):
        yield
        return
    _calls = RollCall(rank(), count(), what, 0 if _calls is None else _calls.number + 1)
    try:
        with _calls.held():
            check_same(shared_versions(), "versions of Python and of its libraries")
            yield
    except BaseException as error:
        # where all hold one model together, each forward waits for all
        elsewhere = _calls.broken_off(error)
        _calls.leave(elsewhere or error)
        if elsewhere is not None:
            raise elsewhere from error
        raise


@contextmanager
def apart() -> Iterator[None]:
    """A scope in which this process is a run of its own, such as one run of a sweep, whatever it was started with."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def gathered(value: Value) -> list[Value]:
    """Every process's value, by rank, in every process. All of them must call it."""
    if count() == 1:
        return [value]
    values: list = [None] * count()
    _spoken(lambda: dist.all_gather_object(values, value))
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
            said[1] = _portable(error)
    _spoken(lambda: dist.broadcast_object_list(said, src=0))
    if said[1] is not None:
        raise said[1]
    return said[0]


def by_first(act: Callable[[], object]) -> None:
    """Let the first process act while the others wait. What it raises, all of them raise."""
    told(lambda: (act(), None)[1])


def summed(values: Tensor) -> Tensor:
    """The sum of every process's tensor, in the same bits everywhere. All must call it, with one shape and dtype."""
    if count() == 1:
        return values
    total = _sendable(values)
    _spoken(lambda: dist.all_reduce(total))
    return total.to(values.device)


def as_first(tensors: Iterable[Tensor]) -> None:
    """Make tensors in place what they are in the first process. All must call it, with the same shapes and dtypes."""
    if count() > 1:
        for tensor in tensors:
            sent = _sendable(tensor)
            _spoken(lambda sent=sent: dist.broadcast(sent, src=0))
            with torch.no_grad():
                tensor.copy_(sent)


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
    if not all(same_json(other, values[0]) for other in values[1:]):
        listed = "; ".join(f"process {number}: {other}" for number, other in enumerate(values))
        raise ValueError(f"expected the same {what} in every process, got {listed}")


def _is_lost() -> bool:
    return _calls is not None and _calls.lost is not None


def _check_not_lost() -> None:
    if _is_lost():
        raise ElsewhereError(f"the processes of this run have lost each other ({_calls.lost}): start all of them again")


def _sendable(tensor: Tensor) -> Tensor:
    """A copy that a group can send: from other devices than CUDA's through the host."""
    own = tensor.detach().clone().contiguous()
    return own if own.device.type == "cuda" else own.cpu()


def _spoken(collective: Callable[[], object]) -> None:
    """Call a collective. Raises ElsewhereError, naming whom it can, where another process does not take part."""
    _check_not_lost()
    try:
        collective()
    # torch's errors of communication are this one and its kin
    except RuntimeError as error:
        calls = _calls or RollCall(rank(), count(), "its work", -1)
        raise ElsewhereError(calls.whom(error)) from error


def _portable(error: Exception) -> Exception:
    """An error that reaches the other processes as it is; one that cannot be sent, as its words."""
    holds = (*error.args, *vars(error).values())
    try:
        copy.copy(error)
        if "<locals>" not in type(error).__qualname__ and all(isinstance(one, _SENT) for one in holds):
            return error
    except Exception:
        # its class takes other arguments than it keeps
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
