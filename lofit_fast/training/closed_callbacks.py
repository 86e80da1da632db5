"""Callbacks that hold something while a training runs, and let go of it however the training ends.

Trainer tells its callbacks of an end that was reached, and of no error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from transformers import TrainerCallback


class ClosedCallback(TrainerCallback):
    """A callback with a `close`, which lets go of what it holds, and may be called again."""

    def close(self) -> None:
        """Nothing is held."""

    def on_train_end(self, args, state, control, **_):
        """A training is over."""
        self.close()


@contextmanager
def closed(callbacks: Iterable[TrainerCallback]) -> Iterator[None]:
    """A scope after which those of them that hold something have let go of it, after an error too."""
    with ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, ClosedCallback):
                stack.callback(callback.close)
        yield
