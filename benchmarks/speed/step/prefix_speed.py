"""The prefix cache: step 2 with heads in the upper quarter of the layers only, off against on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks.peers.peer import SAME_ENGINE, Absent
from benchmarks.speed.step import step_level
from benchmarks.speed.step.row_process import Host
from benchmarks.speed.step.rows import Live, Row, live
from benchmarks.speed.step.workload import Workload
from lofit_fast.patching.patched import handle_of
from lofit_fast.training.engine import Engine, collator_of

ROW = Row("ours", SAME_ENGINE, "step 2, upper quarter")
GB = 4.0


def prefix_speedup(
    base: nn.Module,
    work: Workload,
    *,
    rounds: int,
    examples: int,
    engine: Engine | None = None,
    host: Host | None = None,
) -> dict:
    """Seconds per round with the cache off and on, the cache filled before; fill_seconds beside them.

    host: as in `step_level.step_seconds`.
    """
    rows = [Row(name, SAME_ENGINE, ROW.step) for name in ("off", "on")]
    how = {"engine": engine, "host": host, "opened": partial(_opened, work)}
    report = step_level.step_seconds(base, work, rows, rounds=rounds, examples=examples, **how)
    fill = [row.pop("fill_seconds") for row in report["rows"] if "fill_seconds" in row]
    return {**report, "fill_seconds": fill[0] if fill else None}


@contextmanager
def _opened(work: Workload, model: nn.Module, row: Row, engine: Engine, copied: Callable) -> Iterator[Live]:
    with live(model, ROW, engine, copied) as plain, _CACHES[row.peer](plain, work) as one:
        yield one


@contextmanager
def _cached(one: Live, work: Workload) -> Iterator[Live]:
    from lofit_fast.training.prefix_cache.cache import prefix_cached

    plain = one.collate or collator_of(one.engine, work.pad, one.logits)
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        prefix_cached(handle_of(one.attached.model), work.rows, plain, gb=GB, folder=Path(folder)) as collate,
    ):
        filled = time.perf_counter() - started
        if collate is plain:
            raise Absent("the prefix cache found nothing to keep")
        yield replace(one, collate=collate, notes={"fill_seconds": filled})


_CACHES = {"off": lambda one, work: nullcontext(one), "on": _cached}
