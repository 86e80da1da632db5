"""What a training costs: rates in real tokens and examples, and the memory it takes above what was there before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lofit_fast.training.engine.cpu_extras import release_free_memory

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# asks the kernel to forget the peak of the resident set size so far
_RESET_PEAK = "5"


@dataclass
class Memory:
    """peak_bytes: the most held at once inside the scope, above what was held at its beginning; None if unknown."""

    peak_bytes: int | None = None


@contextmanager
def peak_memory(*devices: torch.device | str) -> Iterator[Memory]:
    """A scope that measures: on CUDA what torch allocates, elsewhere the resident set size of the process (Linux).

    devices: at least one; the peaks of several GPUs are added, whether they come at one time or not.
    On a CPU, what was freed before and malloc still holds is given back first: using it again counts. Memory that a
    first step maps (libraries, thread pools, weights not read yet) counts too, and so does whatever else the process
    does meanwhile. Where the system keeps no peak that can be reset, peak_bytes stays None.
    """
    memory = Memory()
    gpus = [device for device in map(torch.device, devices) if device.type == "cuda"]
    if gpus:
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        before = sum(map(torch.cuda.memory_allocated, gpus))
        yield memory
        memory.peak_bytes = sum(map(torch.cuda.max_memory_allocated, gpus)) - before
        return
    gc.collect()
    release_free_memory()
    before = _resident("VmRSS") if reset_peak() else None
    yield memory
    if before is not None:
        memory.peak_bytes = max(0, _resident("VmHWM") - before)


def rates(examples: int, tokens: int, seconds: float) -> dict[str, float]:
    """tokens_per_s and examples_per_s; 0.0 for no time. tokens: real ones, without padding."""
    return {
        "tokens_per_s": tokens / seconds if seconds else 0.0,
        "examples_per_s": examples / seconds if seconds else 0.0,
    }


def reset_peak() -> bool:
    """Start the process's peak of resident memory anew. False where the system has no such switch."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    """A line of the process's status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")
