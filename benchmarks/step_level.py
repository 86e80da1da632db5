"""Step level: training steps of several providers, interleaved, on the same examples."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict

import torch
from torch import nn

from benchmarks.check import Checks
from benchmarks.providers import AS_RUN, Absent
from benchmarks.settings import Live, Row, live, settled_engine
from benchmarks.timing import interleaved, ratio
from benchmarks.workload import Workload, real_tokens
from lofit_fast.training.engine import Engine


def measure(
    base: nn.Module,
    work: Workload,
    rows: Sequence[Row],
    *,
    rounds: int,
    examples: int,
    engine: Engine | None = None,
    opened: Callable[[nn.Module, Row, Engine], AbstractContextManager[Live]] = live,
    say: Callable[[str], None] = print,
) -> dict:
    """Seconds per round of every row, as plain data.

    A round is the same `examples` examples for all, others than the round before; each row batches them its own way.
    Rows that are absent, or whose loss is wrong, are listed with the reason and have no seconds. warm_seconds: the
    first pass, which compiles what is compiled. opened: how a row is put into a model.
    """
    engine = engine or settled_engine(base, work)
    done: list[dict] = []
    with ExitStack() as scopes:
        # several models share the code of a layer here: past the limit torch would quietly run some uncompiled
        scopes.enter_context(torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True))
        lives: dict[int, Live] = {}
        checks = Checks(base, work)
        for row in rows:
            entry = {**asdict(row)}
            done.append(entry)
            try:
                one = scopes.enter_context(opened(base, row, engine))
            except Absent as reason:
                entry["absent"] = str(reason)
                continue
            say(f"checking and warming up: {row}")
            entry |= _admitted(one, checks, work, examples)
            if "red" in entry:
                say(f"NOT TIMED, its loss is wrong: {row}: {entry['red']}")
            else:
                lives[len(done) - 1] = one
        _meet_every_shape(lives.values(), work, rounds, examples)
        graphs = _graphs()
        passes = {str(at): _pass(one, work, examples) for at, one in lives.items()}
        say(f"{rounds} rounds of {examples} examples, {len(passes)} providers in turns")
        device = next(base.parameters()).device.type
        for at, seconds in interleaved(passes, rounds=rounds, warmup=0, device=device).items():
            done[int(at)]["seconds"] = seconds
    _compare_with_floor(done)
    return {
        "rows": done,
        "rounds": rounds,
        "examples_per_round": examples,
        "real_tokens": [real_tokens(work.drawn(number, examples)) for number in range(1, rounds + 1)],
        "workload": work.describe(),
        "engine": asdict(engine),
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "graphs_compiled_while_timing": _graphs() - graphs,
    }


def _meet_every_shape(lives: Iterable[Live], work: Workload, rounds: int, examples: int) -> None:
    """An untimed pass of one row of our engine over all rounds, so that no product's blocks are measured in a round."""
    ours = next((one for one in lives if one.row.setting != AS_RUN), None)
    for number in range(1, rounds + 1) if ours else ():
        for batch in ours.batches(work.drawn(number, examples), work.pad):
            ours.step(batch)


def _admitted(one: Live, checks: Checks, work: Workload, examples: int) -> dict:
    """The check of a row's loss, and if it holds the seconds of its first pass."""
    started = time.perf_counter()
    check = checks(one)
    entry: dict = {"check": check.as_dict()}
    if not check.ok:
        return entry | {"red": f"loss {check.loss:.5f}, expected {check.reference:.5f} +- {check.tolerance:.5f}"}
    batches = one.batches(work.drawn(0, examples), work.pad)
    # nothing compiles as run beyond a hook's own function, and one batch warms that
    for batch in batches[:1] if one.row.setting == AS_RUN else batches:
        one.step(batch)
    return entry | {"warm_seconds": time.perf_counter() - started}


def _compare_with_floor(rows: list[dict]) -> None:
    """Add vs_floor, the ratio of each row to its own setting's floor, where both were timed."""
    floors = {row["setting"]: row["seconds"] for row in rows if row["provider"] == "floor" and "seconds" in row}
    for row in rows:
        if "seconds" in row and row["setting"] in floors:
            row["vs_floor"] = asdict(ratio(row["seconds"], floors[row["setting"]]))


def _pass(one: Live, work: Workload, examples: int) -> Callable[[], None]:
    numbers = itertools.count(1)

    def run() -> None:
        for batch in one.batches(work.drawn(next(numbers), examples), work.pad):
            one.step(batch)

    return run


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
