"""LoFiT on chosen tokens the natural way: hooks on the projections that write where a mask is true. The tests' oracle.

It shares no code with the op, the patcher, or how the patcher finds where answers begin.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn


class MaskedHook:
    """z -> (1 + a) z + v before each adapted projection, on the tokens where `mask` is true, and z elsewhere.

    place: a regex of the projections' names, N for the layer. vectors: as of `oracle.vectors_of`.
    mask: (B, S) bool of the next forward, or None for every token. parameters: by (layer, component).
    """

    def __init__(self, model: nn.Module, place: str, vectors) -> None:
        place = place.replace("N", r"\d+")
        found = [(name, module) for name, module in model.named_modules() if re.fullmatch(place, name)]
        self.mask: Tensor | None = None
        self.heads = {key: torch.tensor(heads) for key, (heads, _) in vectors.items()}
        self.parameters = {key: nn.Parameter(rows.detach().clone()) for key, (_, rows) in vectors.items()}
        self._hooks = []
        for name, module in found:
            number = int(next(part for part in name.split(".") if part.isdigit()))
            if any(layer == number for layer, _ in self.parameters):
                self._hooks.append(module.register_forward_pre_hook(self._edit(number)))
        assert len(self._hooks) == len({layer for layer, _ in self.parameters}), [name for name, _ in found]

    def _edit(self, layer: int):
        def edit(module: nn.Module, args: tuple) -> tuple:
            z = edited = args[0]
            for component in ("scale", "offset"):
                rows = self.parameters.get((layer, component))
                if rows is None:
                    continue
                by_head = edited.unflatten(-1, (-1, rows.shape[1]))
                dense = rows.new_zeros(by_head.shape[-2:]).index_copy(0, self.heads[layer, component], rows)
                edited = (by_head * (1 + dense) if component == "scale" else by_head + dense).flatten(-2)
            edited = edited.to(z.dtype)
            if self.mask is None:
                return (edited,)
            return (torch.where(self.mask.reshape(*z.shape[:-1], 1), edited, z),)

        return edit

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
