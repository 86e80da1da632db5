"""One fold for a whole model: W v of every layer at the start of a forward, one gradient for all of them at its end."""

from __future__ import annotations

import os.path

import torch
from torch import Tensor, nn

from lofit_fast.patching.layer import LofitLinear, wide
from lofit_kernels import fold_offsets


class ModelFold:
    """Hands the layers of a patched model their folded offsets for the length of one grad-enabled forward.

    Two hooks on the decoder: the first folds all layers together and leaves each its bias, which carries a graph; the
    second takes the biases away again, after an exception too, so that no module keeps a graph alive. What runs outside
    (a decoder layer called by itself, the second run of an activation checkpoint) finds none, and folds for itself to
    the same bits. Nothing is reused from one forward to the next.
    """

    def __init__(self, decoder: nn.Module, layers: list[LofitLinear]) -> None:
        self.decoder, self.layers = decoder, layers
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
        self._clear()
        if not torch.is_grad_enabled():
            return
        members = [layer for layer in self.layers if _can_fold_early(layer)]
        if members:
            weights, offsets, heads = zip(*((m.weight, wide(m.offset), m.offset_heads) for m in members), strict=True)
            for layer, folded in zip(members, fold_offsets(weights, offsets, heads), strict=True):
                layer.folded_with_graph = folded

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        if module is self.decoder:
            self._clear()

    def _clear(self) -> None:
        for layer in self.layers:
            layer.folded_with_graph = None


def decoder_of(model: nn.Module, names: list[str]) -> nn.Module:
    """The smallest module that is called and has all modules called `names` below it."""
    common = os.path.commonprefix([name.split(".")[:-1] for name in names])
    # containers are never called
    while isinstance(found := model.get_submodule(".".join(common)), nn.ModuleList | nn.ModuleDict):
        common = common[:-1]
    return found


def _can_fold_early(layer: LofitLinear) -> bool:
    """Whether the layer will want its folded offset, and everything that takes is there before its turn has come."""
    if not layer.active or not layer.trains_offset():
        return False
    return _has_storage(layer.weight) and _has_storage(layer.offset) and layer.weight.device == layer.offset.device


def _has_storage(tensor: Tensor) -> bool:
    """Whether the numbers are there: sharded and offloaded weights come layer by layer."""
    if tensor.device.type == "meta" or tensor.dim() != 2:
        return False
    # nothing is sharded or offloaded behind a compiler's back
    return torch.compiler.is_compiling() or tensor.untyped_storage().nbytes() > 0
