"""The random numbers of a process: the states of Python's, numpy's and torch's generators, on a CPU and on CUDA."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RandomStates(NamedTuple):
    """What each generator would go on with. numpy, cuda: None where there was nothing to ask."""

    python: tuple[Any, ...]
    torch: Tensor
    numpy: Any
    cuda: list[Tensor] | None


def random_states() -> RandomStates:
    """The states of all generators of the process."""
    numpy = sys.modules.get("numpy")
    return RandomStates(
        random.getstate(),
        torch.get_rng_state(),
        None if numpy is None else numpy.random.get_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
    )


def set_random_states(states: RandomStates) -> None:
    """Let the generators go on from there."""
    random.setstate(states.python)
    torch.set_rng_state(states.torch)
    if states.numpy is not None:
        sys.modules["numpy"].random.set_state(states.numpy)
    if states.cuda is not None:
        torch.cuda.set_rng_state_all(states.cuda)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """A scope after which random numbers are as if it had not been, whatever was drawn or seeded in it.

    Trainers seed all generators, and some libraries draw where they are imported. `@same_random_numbers()` makes a
    function's call such a scope.
    """
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)
