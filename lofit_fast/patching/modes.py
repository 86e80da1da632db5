"""A model in eval mode for a while, from however many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# what each scope found, of all threads, the first entered first
_FOUND: list[dict[nn.Module, bool]] = []
# the collector of garbage may leave a scope of a generator while its thread holds the lock
_FOUND_LOCK = threading.RLock()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A scope in eval mode, after which every module has the mode it had.

    Modes are the model's, and every thread sees them. Of scopes that overlap, in several threads or in any order, the
    last to be left puts back what the first has found.
    """
    with _FOUND_LOCK:
        modes = {module: module.training for module in model.modules()}
        _FOUND.append(modes)
    try:
        with _FOUND_LOCK:
            model.eval()
        yield
    finally:
        with _FOUND_LOCK:
            at = next(i for i, found in enumerate(_FOUND) if found is modes)
            later = _FOUND[at + 1 :]
            del _FOUND[at]
            for module, training in modes.items():
                # who entered since, and is still inside, has what this one has found to put back
                heir = next((found for found in later if module in found), None)
                if heir is None:
                    module.training = training
                else:
                    heir[module] = training
