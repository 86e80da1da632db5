"""Vectors that act on answers alone, over prompts computed beforehand, against the same vectors at every position.

Both in our engine, as training chooses it for each: whole sequences through compiled layers, answers through uncompiled
ones. What is compared is the time of a step, not what is learned: that is what `benchmarks.accuracy` is for.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import lofit_fast as lf
from benchmarks.peers.peer import SAME_ENGINE, Absent, Attached
from benchmarks.speed.step.rows import LEARNING_RATE, Live, Row, live, settled_engine
from benchmarks.speed.step.steps import STEPS, vectors
from benchmarks.speed.step.workload import Workload, real_tokens
from benchmarks.speed.timing import in_turns, ratio, seconds_of
from lofit_fast.data.collate import on_device
from lofit_fast.models.logit_rows import SCOPED, logit_rows
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.models.trials import rounding
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.training.answer_batches import AnswerCollator
from lofit_fast.training.engine import Engine, collator_of, prepared
from lofit_fast.training.engine.cpu_extras import pays_to_prepack
from lofit_fast.training.prompt_store import prompts_kept

GB = 16.0
# over which the filling is counted once
EPOCHS = 5
TIMED = ("step 1", "step 2")


def answer_speedup(
    base: nn.Module,
    work: Workload,
    *,
    rounds: int,
    examples: int,
    engine: Engine | None = None,
    steps: Sequence[str] = TIMED,
    say: Callable[[str], None] = print,
) -> dict:
    """By step, how many times longer steps take with vectors at every position than on answers alone, interleaved.

    A round is the same `examples` examples for both. engine: of whole sequences.

    Returns {"steps": {step: {"seconds", "speedup", "speedup_with_filling", "fill_seconds", "tokens"}}, "rounds",
    "examples_per_round", "real_tokens", "workload", "engine"}. speedup: with the prompts' keys and values there.
    speedup_with_filling: of EPOCHS epochs over all of the workload, what filling took once among them. tokens: that go
    through the model per example, padding included, of both.
    Raises Absent where prompts cannot be kept.
    """
    engine = engine or settled_engine(base, work)
    of_step = partial(_one_step, base, work, rounds, examples, engine)
    measured = {}
    for step in steps:
        say(f"{step}: vectors at every position and on answers alone, {rounds} rounds of {examples} examples")
        measured[step] = of_step(step)
    return {
        "steps": measured,
        "rounds": rounds,
        "examples_per_round": examples,
        "real_tokens": [real_tokens(work.drawn(number, examples)) for number in range(1, rounds + 1)],
        "workload": work.describe(),
        "engine": asdict(engine),
    }


def _one_step(base: nn.Module, work: Workload, rounds: int, examples: int, engine: Engine, step: str) -> dict:
    row = Row("ours", SAME_ENGINE, step)
    with ExitStack() as scopes:
        rows = {
            "all": scopes.enter_context(live(base, row, engine)),
            "answer": scopes.enter_context(_alone(base, row, work, engine)),
        }
        for one in rows.values():
            # the first pass of every width, in which layers are compiled
            _steps(one, work, 0, examples)
        device = next(base.parameters()).device.type
        timed = {name: partial(_round, one, work, examples, device) for name, one in rows.items()}
        seconds = in_turns(timed, rounds=rounds)
        counted = {name: _tokens(one, work, examples) for name, one in rows.items()}
    fill = rows["answer"].notes["fill_seconds"]
    made = ratio(seconds["all"], seconds["answer"])
    epochs = EPOCHS * len(work.rows) / examples
    whole, short = (epochs * statistics.median(seconds[name]) for name in ("all", "answer"))
    return {
        "seconds": seconds,
        "speedup": asdict(made),
        "speedup_with_filling": whole / (fill + short),
        "fill_seconds": fill,
        "tokens": counted,
    }


@contextmanager
def _alone(base: nn.Module, row: Row, work: Workload, engine: Engine) -> Iterator[Live]:
    """The row's vectors on answers alone, in a copy of the model, over prompts that are kept."""
    model = copy.deepcopy(base)
    component, choose = STEPS[row.step]
    handle = lf.patch(model, lf.LofitConfig(**{component: choose(base)}, positions="answer"))
    values = vectors(base, row.step)
    with torch.no_grad():
        for (layer, name), (_, numbers) in values.items():
            getattr(handle.layers[layer], name).copy_(numbers)
    model.train()
    # as our own training chooses where prompts are kept
    chosen = replace(engine, compile=False, narrow=False, large_pages=False, prepack=pays_to_prepack(model))
    with tempfile.TemporaryDirectory() as folder, prepared(model, chosen), selecting_rows(model):
        logits = logit_rows(model, SCOPED)
        whole = collator_of(chosen, work.pad, logits)
        how = {"pad_token_id": work.pad, "logits": logits, "gb": GB, "folder": Path(folder)}
        started = time.perf_counter()
        with prompts_kept(handle, work.rows, whole, **how) as collate:
            if not isinstance(collate, AnswerCollator):
                raise Absent("the model's prompts cannot be kept")
            notes = {"fill_seconds": time.perf_counter() - started}
            _check(handle, work, collate)
            optimizer = torch.optim.AdamW(handle.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
            attached = Attached(model, list(handle.parameters()), penalty=_penalty(handle))
            yield Live(row, attached, optimizer, chosen, collate=collate, notes=notes, logits=logits)


def _penalty(handle: LofitHandle):
    scales = [layer.scale for layer in handle.layers.values() if layer.scale is not None]
    return (lambda: torch.cat([scale.flatten() for scale in scales]).abs().sum()) if scales else None


def _check(handle: LofitHandle, work: Workload, collate: AnswerCollator) -> None:
    """Raise ValueError where the loss of a batch is another one than of whole sequences with the vectors masked."""
    rows = work.drawn(0, 4)
    batches = [on_device(make(rows), next(handle.model.parameters()).device) for make in (collate, collate.collator)]
    got, expected = (handle.model(**{**batch, "use_cache": False}).loss.item() for batch in batches)
    if not abs(got / expected - 1) <= rounding(handle.model):
        raise ValueError(f"answers alone have the loss {got}, whole sequences {expected}")


def _round(one: Live, work: Workload, examples: int, device: str, number: int) -> float:
    return seconds_of(lambda: _steps(one, work, number, examples), device)


def _steps(one: Live, work: Workload, number: int, examples: int) -> None:
    for batch in one.batches(work.drawn(number, examples), work.pad):
        one.step(batch)


def _tokens(one: Live, work: Workload, examples: int) -> float:
    """Tokens of a round that go through the model, padding included, per example."""
    return sum(batch["input_ids"].numel() for batch in one.batches(work.drawn(1, examples), work.pad)) / examples
