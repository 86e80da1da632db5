"""The devices that a sweep's workers are put on: read, and held against what is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lofit_fast.models.device import best_device, name_of_chip
from lofit_fast.training.sweep.launched import VISIBLE, Launch

CPU = "cpu"


def accelerators() -> tuple[str, int]:
    """(kind, how many) of the accelerators that this process sees; ("cpu", 0) where there are none."""
    kind = best_device().type
    return (kind, torch.accelerator.device_count()) if kind in VISIBLE else (CPU, 0)


def worker_devices(
    asked: str | Sequence[str | int], here: Callable[[], tuple[str, int]] = accelerators
) -> tuple[str, ...]:
    """One device per worker: "0,2" -> ("cuda:0", "cuda:2"); "cpu,cpu" is two workers on the CPU.

    asked: numbers of accelerators, names such as cuda:1, or cpu, in a text with commas or a sequence.
    Raises ValueError for a device that is not here, or for devices of several kinds: a run's bits would depend on
    which worker is free.
    """
    parts = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else [str(part) for part in asked]
    if not parts or not all(parts):
        raise ValueError(f"expected devices like 0,1 or cuda:0,cuda:1 or cpu,cpu, got {asked!r}")
    devices = tuple(_device(part, *here()) for part in parts)
    if len(kinds := sorted({device.partition(":")[0] for device in devices})) > 1:
        raise ValueError(f"expected devices of one kind, since a run's last bits depend on it, got {', '.join(kinds)}")
    return devices


def _device(part: str, kind: str, count: int) -> str:
    if part == CPU:
        return CPU
    name, sign, index = part.partition(":") if not part.isdecimal() else (kind, ":", part)
    known = ", ".join(f"{kind}:{number}" for number in range(count)) or "no accelerator, so only cpu"
    if name != kind or kind == CPU or (sign and not index.isdecimal()) or int(index or 0) >= count:
        raise ValueError(f"device {part!r} is not here, expected one of: {known}")
    return f"{name}:{int(index or 0)}"


def launched_device(launch: Launch, here: Callable[[], tuple[str, int]] = accelerators) -> str:
    """The device of one of several processes that were started together: each has its own of the machine's.

    Raises ValueError where a machine has more processes than accelerators. Of one accelerator it cannot be told here:
    SLURM may let each task see its own alone, which is the first to all of them. Processes that meet compare
    `chip_of`.
    """
    kind, count = here()
    if kind == CPU:
        return CPU
    if count == 1 and launch.local_count > 1:
        return f"{kind}:0"
    if launch.local >= count:
        raise ValueError(
            f"got {launch.local_count} processes on a machine of {count} {kind} devices: expected one each at most"
        )
    return f"{kind}:{launch.local}"


def chip_of(launch: Launch, grid_device: str) -> str:
    """What tells the device of one of several processes from those of the others on its machine."""
    if grid_device == CPU or launch.local_count == 1:
        return CPU
    return name_of_chip(torch.device(launched_device(launch)))


def inside(device: str | None) -> str | None:
    """What a worker calls its device, of which it sees no other: the first of its kind."""
    return device if device in (None, CPU) else f"{device.partition(':')[0]}:0"
