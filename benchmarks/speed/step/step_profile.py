"""Where the time of one of our steps goes, by kind of work."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from benchmarks.speed.step.rows import Row, live, settled_engine
from benchmarks.speed.step.workload import BATCH, Workload
from lofit_fast.training.engine import Engine
from lofit_fast.training.profiling import summarize

BATCHES = 4


def step_kinds(base: nn.Module, work: Workload, row: Row, engine: Engine | None = None) -> dict:
    """Seconds of a warm step by kind of work and by operation, as `lofit-fast train --profile` counts them."""
    engine = engine or settled_engine(base, work)
    on_gpu = next(base.parameters()).device.type == "cuda"
    with live(base, row, engine) as one:
        batches = one.batches(work.rows[: BATCH * BATCHES], work.pad)
        # past the eighth pass, before which the heap is moved
        for batch in batches * 2:
            one.step(batch)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
            started = time.perf_counter()
            for batch in batches:
                one.step(batch)
            seconds = time.perf_counter() - started
    return {"row": str(row), **summarize(seen.events(), seconds, len(batches))}
