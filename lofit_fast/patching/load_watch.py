"""A warning where a state_dict is loaded into a patched model: it never holds the vectors, which stay behind."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn

MESSAGE = (
    "a state_dict was loaded into a model patched by LoFiT: the rest of the model was filled, the LoFiT vectors stay "
    "what they were, since no state_dict holds them. To resume or restore a checkpoint, give the trainer "
    "callbacks=[lofit_fast.AdapterCheckpoints(handle)], call lofit_fast.AdapterCheckpoints(handle).follow("
    "accelerator), or save and load the adapter beside it: handle.save(folder), lofit_fast.load(model, folder)"
)


class LoadWatch:
    """Warns when somebody loads a state_dict into a patched model and nobody restores the vectors.

    Trainer does so when it resumes and when it takes the best model back, accelerate in load_state. What restores
    vectors signs up with `expect`; then the warning waits for the next forward or `remind`, and `settled` cancels it.
    layer: the adapted layer that is watched; a load of any module above it counts. decoder: whose forward is the next.
    """

    def __init__(self, layer: nn.Module, decoder: nn.Module) -> None:
        self.decoder = decoder
        self._restorers: weakref.WeakSet = weakref.WeakSet()
        self._owed: Any = None
        self._vectors_came_first = False
        self._hook = layer.register_load_state_dict_post_hook(self._loaded)
        self._first_hook = layer.register_load_state_dict_pre_hook(self._about_to_load)

    def expect(self, restorer: object) -> None:
        """Trust an object, for as long as it lives, to restore the vectors after a load."""
        self._restorers.add(restorer)

    def expect_base(self) -> None:
        """The vectors have been restored already: the next load is that of the base beside them."""
        self._vectors_came_first = True

    def settled(self) -> None:
        """The vectors have been restored."""
        if self._owed is not None:
            self._owed.remove()
            self._owed = None

    def remind(self) -> None:
        """Warn if a load still waits for its vectors."""
        if self._owed is not None:
            self.settled()
            warnings.warn(MESSAGE, stacklevel=3)

    def remove(self) -> None:
        """Watch no longer."""
        self.settled()
        self._hook.remove()
        self._first_hook.remove()

    def _about_to_load(self, module: nn.Module, *_: object) -> None:
        # the base comes back from where the vectors do not go, as accelerate has it when it shards a model
        if any(p.device.type == "meta" for p in module.inner.parameters()):
            self.expect_base()

    def _loaded(self, module: nn.Module, incompatible_keys: object) -> None:
        if self._vectors_came_first:
            self._vectors_came_first = False
        elif not self._restorers:
            warnings.warn(MESSAGE, stacklevel=2)
        elif self._owed is None:
            self._owed = self.decoder.register_forward_pre_hook(self._complain)

    def _complain(self, module: nn.Module, args: tuple) -> None:
        self.remind()

    def __getstate__(self) -> dict:
        # a copy is restored by nobody yet, and weak references cannot be pickled
        return {**vars(self), "_restorers": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _restorers=weakref.WeakSet())
