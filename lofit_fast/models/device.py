"""Where a model computes and in what: devices and dtypes by name, and the best of this machine, by rule."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Processor:
    """What the choice of a CPU's dtype looks at: matrix instructions, AVX-512's for bfloat16, and who made it."""

    amx: bool
    avx512_bf16: bool
    vendor: str


@dataclass(frozen=True)
class CpuDtype:
    """A row of CPU_DTYPES. measured: how fast products of SmolLM2's sizes were, with torch 2.13, and where."""

    fits: Callable[[Processor], bool]
    dtype: torch.dtype
    measured: str


# the first row that fits
CPU_DTYPES = (
    CpuDtype(
        lambda cpu: cpu.amx, torch.bfloat16, "Intel Xeon with AMX: 1.6 TFLOP/s and more in bfloat16 on two threads"
    ),
    CpuDtype(
        lambda cpu: cpu.avx512_bf16 and cpu.vendor == "AuthenticAMD",
        torch.bfloat16,
        "AMD EPYC, family 26: 0.68 to 0.90 TFLOP/s in bfloat16 on two threads, 0.17 to 0.21 in float32",
    ),
    # other makers' AVX-512 bf16 too: one that has it without AMX was met, and is slow in it
    CpuDtype(
        lambda cpu: True,
        torch.float32,
        "AVX-512 VNNI, no AMX: 22 to 82 GFLOP/s in bfloat16 on one thread, 38 to 138 in float32",
    ),
)


def best_device() -> torch.device:
    """The accelerator torch would use, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None and accelerator.type in ("cuda", "xpu") else torch.device("cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it natively and fast, float32 elsewhere: a rule, and no clock.

    On a CPU the first row of `CPU_DTYPES` that fits decides.
    """
    fast = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "xpu": lambda: True,
        "cpu": lambda: _cpu_dtype() == torch.bfloat16,
    }
    return torch.bfloat16 if fast.get(device.type, lambda: False)() else torch.float32


def _cpu_dtype() -> torch.dtype:
    seen = Processor(torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported(), vendor())
    return next(row.dtype for row in CPU_DTYPES if row.fits(seen))


def vendor() -> str:
    """The processor's maker as it names itself, "AuthenticAMD" say; "" where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def as_device(device: str | torch.device) -> torch.device:
    """A torch device from its name.

    Raises ValueError for a name torch does not know, a device that is not here, or one that keeps no numbers (meta).
    """
    name = str(device)
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    # each kind of device has errors of its own, of libraries that are not installed too
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot use device {name!r}: {reason}") from error
    if device.type == "meta":
        raise ValueError(f"cannot use device {name!r}: it keeps no numbers, expected one that computes")
    return device


def name_of_chip(device: torch.device) -> str:
    """What tells a device from the others of its machine: on CUDA its UUID where torch knows it, else its name.

    By names alone processes that see a GPU each, as under SLURM, all have cuda:0.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        # one that cannot be used says so when it is
        with suppress(RuntimeError):
            uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
            return str(device) if uuid is None else f"GPU-{uuid}"
    return str(device)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name. Raises ValueError listing the known names."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
