"""What would make the host wait for an accelerator, noticed without one.

On torch's meta device nothing has a value: an operation that needs one raises, as `.item()`, `nonzero` and a mask as an
index do. What does not raise is seen by a dispatch mode: copies to and from the host that are not asked to go on
beside it. Unlike torch's fake tensors, transformers runs its own checks on these.
"""

import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import lofit_fast as lf

META = torch.device("meta")
# need a value, or how many there are
READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "item")
_MADE = (torch.tensor, torch.as_tensor)


def on_meta(model):
    """The model, its parameters and all on the meta device, as if it computed there."""
    model.to(META)
    # which keeps vectors in memory otherwise
    for layer in lf.handle_of(model).layers.values():
        for name, vectors in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, torch.nn.Parameter(vectors.to(META), vectors.requires_grad))
        layer.place_heads()
    # what accelerate leaves on a model whose weights are elsewhere
    model._hf_hook = SimpleNamespace(execution_device=META)
    return model


def meta_as_an_accelerator(monkeypatch):
    """The meta device has no autocast, which torch raises for when asked, and is not listed for fused optimizers."""
    optimizer = sys.modules["torch.optim.optimizer"]
    fused = optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(optimizer, fused.__name__, lambda: [*fused(), "meta"])
    asked, scope = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *args, **more: nullcontext() if kind == "meta" else scope(kind, *args, **more)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != "meta" and asked(device))


class Waits(TorchDispatchMode):
    """Counts by name what the host would wait for. device: of the tensors that count; the host's own do not."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seen, self.paused = torch.device(device), Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.paused:
            self.note(func.overloadpacket.__name__, args, kwargs)
        return func(*args, **kwargs)

    def note(self, name, args, kwargs):
        given = [each for arg in args for each in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        here = self.device.type
        masks = [t for t in tensors[1:] if t.dtype in (torch.bool, torch.uint8)]
        if here in devices and (name in READING or (name.startswith("index") and name != "index_select" and masks)):
            self.seen[name] += 1
        target = kwargs.get("device")
        ends = devices | ({torch.device(target).type} if target is not None else set())
        crossing = name in ("_to_copy", "copy_") and len(ends) > 1
        if crossing and not (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:3])):
            self.seen[f"blocking {name}"] += 1


class Made(TorchFunctionMode):
    """Counts tensors that are made on the host for a device: such a copy is waited for."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seen, self.paused = torch.device(device), Counter(), False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.paused and func in _MADE and torch.device(kwargs.get("device") or "cpu").type == self.device.type:
            self.seen[func.__name__] += 1
        return func(*args, **kwargs)


class EndOfEpoch(Exception):
    """Where the losses would be read."""


class OneEpoch(TrainerCallback):
    """Counts steps, has the modes count from the first epoch's beginning, and stops where it ends."""

    def __init__(self, *modes):
        self.steps, self.modes = 0, modes
        for mode in modes:
            mode.paused = True

    def on_epoch_begin(self, args, state, control, **_):
        for mode in self.modes:
            mode.paused = False

    def on_step_end(self, args, state, control, **_):
        self.steps += 1

    def on_epoch_end(self, args, state, control, **_):
        raise EndOfEpoch
