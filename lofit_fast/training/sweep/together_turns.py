"""Calls that take turns: each in a thread of its own, of which one runs at a time.

What a training keeps for the whole process is each call's own: the random numbers, and accelerate's record of whether
gradients are being accumulated, by which it steps optimizers.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Mapping

import torch

from lofit_fast.random_states import random_states, set_random_states

Ask = Callable[[object], object]


class _Stopped(BaseException):
    """Ends a call that waits for an answer which nobody gives."""


class Turn:
    """A call that runs while somebody waits for it, until it asks for something or ends.

    call: given a function that asks: what it is given stands in `asked`, and what the next `go_on` is given comes back.
    It begins in a copy of the context, and with the state of the process, that are there at its first turn. over:
    whether it has ended, with a result or an error.
    """

    def __init__(self, call: Callable[[Ask], object]) -> None:
        self._call = call
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._threads = torch.get_num_threads()
        self._state: tuple | None = None
        self._answer: object = None
        self._thread: threading.Thread | None = None
        self._runs = self._stop = False
        self.asked: object = None
        self.result: object = None
        self.error: BaseException | None = None
        self.over = False

    def go_on(self, answer: object = None) -> bool:
        """Let it run until it asks, or ends. Returns whether it asks."""
        before = _process_state()
        if self._state is not None:
            _set_process_state(self._state)
        self._answer, self._runs = answer, True
        if self._thread is None:
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        self._runs = False
        self._state = _process_state()
        _set_process_state(before)
        return not self.over

    def stop(self) -> None:
        """End it, wherever it waits; its scopes are left."""
        if self._runs:
            # an interrupt came while it ran
            self._back.acquire()
            self._runs = False
        if self._thread is not None and not self.over:
            self._stop = True
            self._go.release()
            self._back.acquire()

    def _ask(self, question: object) -> object:
        self.asked = question
        self._back.release()
        self._go.acquire()
        if self._stop:
            raise _Stopped
        return self._answer

    def _run(self) -> None:
        # of each thread by itself
        torch.set_num_threads(self._threads)
        try:
            self.result = self._call(self._ask)
        except _Stopped:
            pass
        # whoever waits decides what it means
        except BaseException as error:
            self.error = error
        finally:
            self.over = True
            self._back.release()


def _process_state() -> tuple:
    accelerate = sys.modules.get("accelerate.state")
    return random_states(), {} if accelerate is None else _copied(accelerate.GradientState._shared_state)


def _set_process_state(state: tuple) -> None:
    of_random, of_accelerate = state
    set_random_states(of_random)
    if (accelerate := sys.modules.get("accelerate.state")) is not None:
        shared = accelerate.GradientState._shared_state
        shared.clear()
        shared.update(_copied(of_accelerate))


def _copied(state: Mapping[str, object]) -> dict[str, object]:
    # its list of data loaders grows in place
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
