"""One fold for a whole model: W v of every layer at the start of a forward, one gradient for all of them at its end."""

from __future__ import annotations

import os.path
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lofit_fast.patching.early_fold import Call, EarlyFold
from lofit_fast.patching.fully_sharded import MARK
from lofit_fast.patching.layer import LofitLinear
from lofit_kernels import fold_offsets
from lofit_kernels.layer_fold import LayerFold
from lofit_kernels.made_of import MadeOf

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class ModelFold:
    """Hands the layers of a patched model their folded offsets for the length of one grad-enabled forward.

    Two hooks on the decoder: the first folds all layers together and leaves each its bias, which carries a graph; the
    second takes the biases away again, after an exception too, so that no module keeps a graph alive. What runs outside
    (a decoder layer called by itself, the second run of an activation checkpoint) finds none, and folds for itself to
    the same bits. Nothing is reused from one forward to the next. What scopes reuse is looked at here, too.
    """

    def __init__(self, decoder: nn.Module, layers: list[LofitLinear]) -> None:
        self.decoder = decoder
        # and those that have others' alone, from the moment that they are there
        self.layers = [layer for layer in layers if layer.heads("offset")]
        self._fold = LayerFold()
        self._hooks: tuple[RemovableHandle, ...] = ()
        if self.layers:
            self._hooks = (
                decoder.register_forward_pre_hook(self._begin),
                decoder.register_forward_hook(self._end, always_call=True),
            )

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: tuple) -> None:
        # a replica of data parallelism shares these hooks, and has layers of its own
        if module is not self.decoder:
            return
        compiling = torch.compiler.is_compiling()
        if not compiling:
            for layer in self.layers:
                here = layer.here
                if here.kept is not None or here.chosen is not None:
                    layer.freshen()
        if not torch.is_grad_enabled():
            self._clear()
            return
        members: list[LofitLinear] = []
        tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in self.layers:
            found = layer.foldable()
            # one that was interrupted may have left something
            layer.here.folded = None
            # FSDP may free what it has left here before the one gradient of all folds reads it. Looked up without a
            # call: this is asked of every layer in every forward
            marked = MARK in layer._modules["inner"].__dict__
            if found is not None and not marked and _is_there(found[0], found[1], compiling):
                members.append(layer)
                tensors.append(found)
        if not members:
            return
        if compiling:
            weights, offsets, heads = zip(*tensors, strict=True)
            for layer, exact, weight in zip(members, fold_offsets(weights, offsets, heads), weights, strict=True):
                layer.here.folded = EarlyFold(exact, weight)
            return
        # the frame that runs these hooks runs the decoder
        call = Call(sys._getframe(1))
        for layer, ready in zip(members, self._fold(tensors), strict=True):
            made_of = MadeOf(ready.weight, layer.own("offset"))
            layer.here.folded = EarlyFold(ready.exact, ready.weight, made_of, ready, call)

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        if module is self.decoder:
            self._clear()

    def _clear(self) -> None:
        for layer in self.layers:
            layer.here.folded = None


def decoder_of(model: nn.Module, names: list[str]) -> nn.Module:
    """The smallest module that is called and has all modules called `names` below it."""
    common = os.path.commonprefix([name.split(".")[:-1] for name in names])
    # containers are never called
    while isinstance(found := model.get_submodule(".".join(common)), nn.ModuleList | nn.ModuleDict):
        common = common[:-1]
    return found


def ancestors_of(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The modules on the way from the model to its decoder, both included."""
    path = next(name for name, module in model.named_modules() if module is decoder).split(".")
    return [model.get_submodule(".".join(path[:n])) for n in range(len(path) + 1)] if path != [""] else [model]


def _is_there(weight: Tensor, offset: Tensor, compiling: bool) -> bool:
    """Whether all that the fold of a layer takes is there before its turn has come, and in one place.

    Sharded and offloaded weights come layer by layer.
    """
    if weight.dim() != 2 or offset.dim() != 2 or weight.device != offset.device or weight.is_meta:
        return False
    # nothing is sharded or offloaded behind a compiler's back
    return compiling or (weight.untyped_storage().nbytes() > 0 and offset.untyped_storage().nbytes() > 0)
