"""Gradient checkpoints: a layer that runs a second time, in the backward pass, finds the scopes of its first run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lofit_fast.patching.acting import Acting

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lofit_fast.patching.scopes import Scopes

# transformers' name for the function that a module checkpoints with
_CHECKPOINT = "_gradient_checkpointing_func"


class CheckpointWatch:
    """Puts a `ScopedCheckpoint` around what each layer of a patched model checkpoints with, before a training forward.

    The second run is made where the backward pass is: after a scope was left, inside another, or in a thread of
    autograd's own. That of a function that a caller gives to `torch.utils.checkpoint` by himself is not seen.

    model: the language model. decoder: the part of it that holds the layers, which may be called by itself. scopes,
    acting: what the layers share; acting is None for vectors that act everywhere.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, scopes: Scopes, acting: Acting | None) -> None:
        self.scopes, self.acting = scopes, acting
        self.checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        called = [model] if decoder is model else [model, decoder]
        self._hooks: list[RemovableHandle] = [module.register_forward_pre_hook(self._begin) for module in called]

    def remove(self) -> None:
        """Take the hooks off, and give back the functions that checkpoint."""
        for hook in self._hooks:
            hook.remove()
        for module in self.checkpointed:
            if isinstance(given := vars(module).get(_CHECKPOINT), ScopedCheckpoint):
                setattr(module, _CHECKPOINT, given.given)

    def _begin(self, module: nn.Module, args: tuple) -> None:
        if not module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        for one in self.checkpointed:
            given = one.__dict__.get(_CHECKPOINT)
            if given is not None and one.gradient_checkpointing and not isinstance(given, ScopedCheckpoint):
                setattr(one, _CHECKPOINT, ScopedCheckpoint(given, self.scopes, self.acting))


class ScopedCheckpoint:
    """A checkpointing function whose second run, in whatever thread, has the scopes and the mask of the first."""

    def __init__(self, given: Any, scopes: Scopes, acting: Acting | None) -> None:
        self.given, self.scopes, self.acting = given, scopes, acting

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        # what a compiled graph has been shown is one of its inputs
        if torch.compiler.is_compiling():
            return self.given(function, *args, **kwargs)
        said, acting = self.scopes.said(), self.acting
        mask = None if acting is None else acting.mask

        def run(*inputs: Any, **named: Any) -> Any:
            with self.scopes.again(said), nullcontext() if acting is None else acting.during(mask):
                return function(*inputs, **named)

        return self.given(run, *args, **kwargs)
