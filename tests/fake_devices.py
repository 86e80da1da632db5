"""Devices that are not there: tensors without numbers that say where they are, and operations that refuse two places.

torch's FakeTensorMode knows what each operation returns and where, and raises where its inputs are in different places.
The devices are called "fake:0", "fake:1" and so on, beside the CPU. Registering their kind is for good: `registered` is
for processes of their own, forked or started. Backward passes need a process that has run none before.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def registered() -> None:
    """Make the devices known to torch, and give accelerate and `torch.tensor` what works with tensors of this kind."""
    import accelerate.hooks
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("fake")
    # which builds a parameter of a tensor's own class
    accelerate.hooks.set_module_tensor_to_device = place
    made = torch.tensor

    def tensor(data, *, device=None, **options):
        value = made(data, **options)
        # else what is done to it is done to real numbers too, on devices that are not there
        value.constant = None
        return value if device is None else value.to(device)

    torch.tensor = tensor


def place(module: nn.Module, name: str, device, value=None, **_) -> None:
    """What accelerate's `set_module_tensor_to_device` does to a parameter or a buffer."""
    *path, name = name.split(".")
    for part in path:
        module = getattr(module, part)
    old = getattr(module, name)
    if name in module._buffers:
        module._buffers[name] = (old if value is None else value).to(device)
    elif value is not None or old.device != torch.device(device):
        moved = (old if value is None else value).detach().to(device)
        module._parameters[name] = nn.Parameter(moved, requires_grad=old.requires_grad)


def move(model: nn.Module, device: str) -> None:
    """As `model.to(device)`, which cannot replace parameters of this kind."""
    for module in model.modules():
        for name in (*module._parameters, *module._buffers):
            if getattr(module, name, None) is not None:
                place(module, name, device)


@contextmanager
def without_numbers():
    """A scope in which tensors have a place and no numbers. Modules are not cast in it."""
    cast = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        nn.Module.to = cast
