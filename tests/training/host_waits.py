"""What would make the host wait for an accelerator, noticed without one.

On torch's meta device nothing has a value: an operation that needs one raises, as `.item()`, `nonzero` and a mask as an
index do. What does not raise is seen by a dispatch mode: copies to and from the host that are not asked to go on
beside it. Unlike torch's fake tensors, transformers runs its own checks on these.
"""

from collections import Counter
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
# need a value, or how many there are
READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "item")
_MADE = (torch.tensor, torch.as_tensor)


def on_meta(model):
    """The model, its parameters and all on the meta device, as if it computed there."""
    model.to(META)
    # what accelerate leaves on a model whose weights are elsewhere
    model._hf_hook = SimpleNamespace(execution_device=META)
    return model


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
