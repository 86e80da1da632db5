"""The prefix cache: step 2 with heads in the upper quarter of the layers only, off against on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from benchmarks import step_level
from benchmarks.providers import SAME_ENGINE, Absent
from benchmarks.settings import Live, Row, live
from benchmarks.workload import Workload
from lofit_fast.patch import handle_of
from lofit_fast.training import CompletionCollator
from lofit_fast.training.engine import Engine

ROW = Row("ours", SAME_ENGINE, "step 2, upper quarter")
GB = 4.0


def measure(base: nn.Module, work: Workload, *, rounds: int, examples: int, engine: Engine | None = None) -> dict:
    """Seconds per round with the cache off and on, the cache filled before; fill_seconds beside them."""
    fill: list[float] = []

    @contextmanager
    def opened(model: nn.Module, row: Row, chosen: Engine) -> Iterator[Live]:
        with live(model, ROW, chosen) as one, ExitStack() as scopes:
            yield one if row.provider == "off" else scopes.enter_context(_cached(one, work, fill))

    rows = [Row("off", SAME_ENGINE, ROW.step), Row("on", SAME_ENGINE, ROW.step)]
    report = step_level.measure(base, work, rows, rounds=rounds, examples=examples, engine=engine, opened=opened)
    return {**report, "fill_seconds": fill[0] if fill else None}


@contextmanager
def _cached(one: Live, work: Workload, fill: list[float]) -> Iterator[Live]:
    from lofit_fast.training.prefix import prefix_cached

    plain = CompletionCollator(work.pad)
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        prefix_cached(handle_of(one.attached.model), work.rows, plain, gb=GB, folder=Path(folder)) as collate,
    ):
        fill.append(time.perf_counter() - started)
        if collate is plain:
            raise Absent("the prefix cache found nothing to keep")
        yield replace(one, collate=collate)
