"""Peak memory of training steps above the loaded model, one peer per process."""

from __future__ import annotations

import ctypes
import gc
import itertools
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from torch import nn

from benchmarks.speed.step.rows import Row, live, settled_engine, uncopied
from benchmarks.speed.step.workload import BATCH, Workload
from lofit_fast.cpu.heap import release_free_memory

STEPS, PASSES = 5, 2


def peak_bytes(base: nn.Module, work: Workload, row: Row, steps: int = STEPS) -> dict:
    """Bytes above what the process held after loading, as plain data.

    On a CPU the peak resident set (VmHWM, reset after loading), on a GPU the allocator's. first_peak: over the first
    `steps` steps, compiling included; steady_peak: over as many again.
    """
    on_gpu = next(base.parameters()).device.type == "cuda"
    engine = settled_engine(base, work)
    meter = _Allocator() if on_gpu else _ResidentSet()
    loaded = meter.now()
    with live(base, row, engine, copied=uncopied) as one:
        batches = one.batches(_examples(work, steps * BATCH), work.pad)
        peaks = []
        # ours and the peers take as many steps: what only grows later counts for both
        for _ in range(PASSES):
            if not row.how.stock and not on_gpu:
                # as our trainer does where an epoch begins
                release_free_memory()
            meter.reset()
            losses = [one.step(batch) for batch in batches]
            peaks.append(meter.peak() - loaded)
    return {
        **asdict(row),
        "steps": steps,
        "passes": PASSES,
        "loaded": loaded,
        "first_peak": peaks[0],
        "steady_peak": peaks[-1],
        "meter": "allocator" if on_gpu else "resident set",
        "last_loss": losses[-1],
        "engine": asdict(engine),
        "workload": work.describe(),
    }


def _examples(work: Workload, count: int) -> list:
    rounds = (work.drawn(number, len(work.rows)) for number in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(rounds), count))


class _ResidentSet:
    def now(self) -> int:
        # what loading has freed but malloc still holds would hide the first allocations of a step
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return psutil.Process().memory_info().rss

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class _Allocator:
    def now(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()
