"""A frozen model with small modules hung beside its own: what most peers are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lofit_fast.patching.patched import handle_of

# the name an edit has as a child of the module it edits, so that optimizers, casts and moves find it
CHILD = "peer"


class Edits:
    """An Attachment of edits: of what modules put out, or of what they are given. No forward is replaced.

    model: frozen until `unpatch`. hosts: (edited module, edit) pairs; an edit is a module that takes hidden states
    (B, S, N) and returns them edited, in their dtype. It becomes a child of its host, on its host's device, and its
    tensors stay in float32 (float64 for a float64 model). A `state_dict` of the model then holds the edits' too.
    Raises ValueError, before anything is changed, for a model that holds LoFiT's vectors or other edits already.
    """

    def __init__(
        self,
        model: nn.Module,
        hosts: list[tuple[nn.Module, nn.Module]],
        of: Literal["output", "input"] = "output",
    ) -> None:
        check_unedited(model)
        self.model, self.enabled = model, True
        self.hosts = hosts
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        weight = next(model.parameters())
        self._hooks = []
        for host, edit in hosts:
            edit.to(device=next(host.parameters(), weight).device, dtype=_wide(weight.dtype)).train(host.training)
            host.add_module(CHILD, edit)
            hook = host.register_forward_hook if of == "output" else host.register_forward_pre_hook
            self._hooks.append(hook(self._after if of == "output" else self._before))

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, by host; empty when the edits were fitted."""
        return (parameter for _, edit in self.hosts for parameter in edit.parameters())

    def n_parameters(self) -> int:
        """How many numbers are added to the model: trained parameters and fitted buffers."""
        fitted = sum(buffer.numel() for _, edit in self.hosts for buffer in edit.buffers())
        return fitted + sum(parameter.numel() for parameter in self.parameters())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A scope in which the model computes what the base computes."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def unpatch(self) -> nn.Module:
        """Take the edits out; what was trainable is again. A second call changes nothing."""
        for hook in self._hooks:
            hook.remove()
        for host, _ in self.hosts:
            host._modules.pop(CHILD, None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._hooks, self._frozen = [], []
        return self.model

    def _after(self, host: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if not self.enabled:
            return None
        edit = getattr(host, CHILD)
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    def _before(self, host: nn.Module, args: tuple) -> tuple | None:
        return (getattr(host, CHILD)(args[0]), *args[1:]) if self.enabled else None


def check_unedited(model: nn.Module) -> None:
    """Raise ValueError for a model with LoFiT's vectors, PEFT's layers or edits in it."""
    ours = handle_of(model) is not None or any(name.endswith(f".{CHILD}") for name, _ in model.named_modules())
    if ours or hasattr(model, "peft_config"):
        raise ValueError("the model is edited already: unpatch() what is in it first")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A scope in which torch draws on the CPU from `seed`, and after which it goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
