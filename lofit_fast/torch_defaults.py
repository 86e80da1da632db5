"""What torch has been told to do by default, and what work of ours does instead: batches are made on the CPU.

`torch.set_default_device`, or `with torch.device(...)`, would make every tensor elsewhere that says no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def made_on_the_cpu() -> Iterator[None]:
    """A scope in which tensors that say no device are on the CPU, as torch begins; of this thread alone."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def training_scope() -> Iterator[None]:
    """The same, with gradients, whatever the caller has switched off."""
    with made_on_the_cpu(), torch.inference_mode(False), torch.enable_grad():
        yield


def on_the_cpu(function: Callable[P, T]) -> Callable[P, T]:
    """A function in the scope of `made_on_the_cpu`."""
    return _within(made_on_the_cpu, function)


def with_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """A function in the scope of `training_scope`."""
    return _within(training_scope, function)


def _within(scope: Callable[[], AbstractContextManager[None]], function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        with scope():
            return function(*args, **options)

    return run
