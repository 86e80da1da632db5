"""Step level: training steps of several peers, interleaved, on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial

from torch import nn

from benchmarks.speed.step.loss_check import references
from benchmarks.speed.step.row_process import Host, Job, here
from benchmarks.speed.step.rows import Live, Row, live, settled_engine
from benchmarks.speed.step.workload import Workload, real_tokens
from benchmarks.speed.timing import in_turns, ratio
from lofit_fast.cpu.heap import release_free_memory
from lofit_fast.training.engine import Engine


def step_seconds(
    base: nn.Module,
    work: Workload,
    rows: Sequence[Row],
    *,
    rounds: int,
    examples: int,
    engine: Engine | None = None,
    host: Host | None = None,
    opened: Callable[..., AbstractContextManager[Live]] = live,
    say: Callable[[str], None] = print,
) -> dict:
    """Seconds per round of every row, as plain data.

    A round is the same `examples` examples for all, others than the round before; each row batches them its own way.
    Rows that are absent, or whose loss is wrong, are listed with the reason and have no seconds. warm_seconds: the
    check and the pass before the first round, in which our engine compiles.

    host: what serves a row, `partial(apart, load)` for a process of its own, as a user's run has one: in company a row
    of ours took some 8 % longer, for what the others did to the heap. By default all rows share this process, each in a
    copy of `base`. opened: how a row is put into a model, see `Job`.
    """
    engine, host = engine or settled_engine(base, work), host or partial(here, base)
    expected = references(base, work, dict.fromkeys(row.step for row in rows))
    release_free_memory()
    done: list[dict] = []
    with ExitStack() as scopes:
        timed = {}
        for row in rows:
            say(f"checking and warming up: {row}")
            one = scopes.enter_context(host(Job(row, work, engine, expected[row.step], rounds, examples, opened)))
            done.append({**asdict(row), **one.entry})
            if "red" in one.entry:
                say(f"NOT TIMED, its loss is wrong: {row}: {one.entry['red']}")
            if one.round is not None:
                timed[len(done) - 1] = one.round
        say(f"{rounds} rounds of {examples} examples, {len(timed)} peers in turns")
        taken = in_turns(timed, rounds=rounds, warmup=0)
    for at, each in taken.items():
        done[at]["seconds"] = [one.seconds for one in each]
    _compare_with_floor(done)
    return {
        "rows": done,
        "rounds": rounds,
        "examples_per_round": examples,
        "real_tokens": [real_tokens(work.drawn(number, examples)) for number in range(1, rounds + 1)],
        "workload": work.describe(),
        "engine": asdict(engine),
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "graphs_compiled_while_timing": sum(one.graphs for each in taken.values() for one in each),
    }


def _compare_with_floor(rows: list[dict]) -> None:
    """Add vs_floor, the ratio of each row to its own setting's floor, where both were timed."""
    floors = {row["setting"]: row["seconds"] for row in rows if row["peer"] == "floor" and "seconds" in row}
    for row in rows:
        if "seconds" in row and row["setting"] in floors:
            row["vs_floor"] = asdict(ratio(row["seconds"], floors[row["setting"]]))
