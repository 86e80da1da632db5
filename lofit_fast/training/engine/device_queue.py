"""How the host runs ahead of an accelerator: copies it does not wait for, and one wait where a clock is read.

An accelerator works through a queue. Whatever the host needs to know of a result makes it wait until the queue is
empty, and the accelerator then waits for the host. A training step here asks for no result: see docs/counts.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lofit_fast.patching.placement import device_of

# the devices that read the host's pinned memory without it
_COPY_BY_THEMSELVES = ("cuda", "xpu")


def runs_ahead(device: torch.device) -> bool:
    """Whether the host can be ahead of a device: not of the CPU, which is the host."""
    return device.type != "cpu"


def devices_of(model: nn.Module) -> list[torch.device]:
    """Where a model computes, each device once: that of its inputs first, then those of a device_map."""
    found = [device_of(model), *(parameter.device for parameter in model.parameters())]
    return list(dict.fromkeys(device for device in found if device.type != "meta")) or found[:1]


def current(device: torch.device) -> AbstractContextManager:
    """A scope in which a device is torch's current one of its kind, whatever is set meanwhile. For CUDA alone."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_current(device: torch.device) -> None:
    """Make a CUDA device the current one: what names none then means this one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def wait_for(devices: Iterable[torch.device]) -> None:
    """Return when each device has done what it was given. For clocks: nothing else here waits for a device."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    for device in devices:
        if accelerator is not None and device.type == accelerator.type:
            torch.accelerator.synchronize(device)


def pins(device: torch.device) -> bool:
    """Whether what is copied to a device should lie in memory that it can copy from by itself."""
    return device.type in _COPY_BY_THEMSELVES and torch.accelerator.is_available()


class Sender:
    """Copies of batches to a device that the host does not wait for.

    On CUDA they go through a stream of their own, beside the work of the step before. Only copies from pinned memory
    do, which a DataLoader with pin_memory=True hands out; others are in order and as slow as ever.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pins = device, pins(device)
        # Apple's reads memory of the host after that may have been freed
        self.beside = device.type != "mps"
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batches: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
        """The batches, with their tensors on the device; what is no tensor stays."""
        if self.stream is None:
            return [self._moved(batch) for batch in batches]
        with torch.cuda.stream(self.stream):
            sent = [self._moved(batch) for batch in batches]
        work = torch.cuda.current_stream(self.device)
        work.wait_stream(self.stream)
        for value in (value for batch in sent for value in batch.values() if isinstance(value, Tensor)):
            # its memory must not be given to the next copy while the step reads it
            value.record_stream(work)
        return sent

    def count(self, items: Tensor | int | None) -> Tensor | int | None:
        """A number that the host has counted, on the device where it is a tensor."""
        ready = items.pin_memory() if self.pins and torch.is_tensor(items) else items
        return self._moved({"items": ready})["items"]

    def _moved(self, batch: Mapping[str, object]) -> dict[str, object]:
        return {
            name: value.to(self.device, non_blocking=self.beside) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
