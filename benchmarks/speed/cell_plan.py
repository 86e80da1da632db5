"""Which cells there are, in order of importance: what the summary needs comes first, so that a cut-off run has it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from benchmarks.peers.peer import AS_RUN, SAME_ENGINE
from benchmarks.peers.table import TIMED
from benchmarks.speed.cells import Cell, Options
from benchmarks.speed.op.layer_level import layer_milliseconds
from benchmarks.speed.op.op_level import operator_seconds
from benchmarks.speed.step import (
    generation_speed,
    losses,
    peak_memory,
    prefix_speed,
    scoring_speed,
    step_level,
    step_profile,
    sweep_speed,
    whole_run,
)
from benchmarks.speed.step.packaged_models import MODELS, loaded, model_alone
from benchmarks.speed.step.row_process import Host, apart
from benchmarks.speed.step.rows import Row, settled_engine
from benchmarks.speed.step.workload import BATCH, POOL, task
from benchmarks.speed.timing import ROUNDS

STEPS = ("step 1", "step 2")
# the two sides of every ratio in the summary; the floor and LoRA do not depend on the step
CORE = (
    *(Row("ours", SAME_ENGINE, step) for step in STEPS),
    Row("floor", SAME_ENGINE),
    *(Row("hook", AS_RUN, step) for step in STEPS),
    Row("lora_all", AS_RUN),
)
MEMORY = (*(Row(name, setting, step) for name, setting in (("hook", AS_RUN), ("ours", SAME_ENGINE)) for step in STEPS),)
MORE_MEMORY = (Row("floor", SAME_ENGINE), *(Row(name, AS_RUN) for name in ("lora", "lora_all", "ia3", "beft")))
PEER_ROUNDS = 3
LOSS_EXAMPLES = 32


def peers(setting: str) -> list[Row]:
    """Every peer in one setting, at both steps where they differ."""
    rows = []
    for name, peer in TIMED.items():
        rows += [Row(name, setting, step) for step in (STEPS if peer.computes == "ours" else ("",))]
    return rows


def plan(full: bool, models: Iterable[str] = tuple(MODELS)) -> list[Cell]:
    """The cells of `make bench`, or of `make bench-full`, by falling importance."""
    models = [model for model in MODELS if model in models]
    cells = [Cell(f"{model}/steps", partial(_core, model), minutes) for model, minutes in _each(models, 6.5, 11)]
    for row in MEMORY:
        cells += [_memory(model, row, minutes) for model, minutes in _each(models, 0.6, 0.8)]
    cells += [
        Cell(f"{model}/prefix cache", partial(_prefix, model), minutes) for model, minutes in _each(models, 1.3, 1.6)
    ]
    cells += [Cell(f"{model}/scoring", partial(_scoring, model), minutes) for model, minutes in _each(models, 1, 1.4)]
    cells += [Cell(f"{model}/sweep", partial(sweep_speed.sweep_runs_per_hour, model), 5) for model in models[:1]]
    cells += [Cell(f"{model}/profile", partial(_profile, model), 1) for model in models]
    cells += _losses_of(models[:1])
    # one model's whole before the next one's
    for model in models:
        cells += _whole_runs(model, [name for name in whole_run.RUNS if model == models[0] or name != "lora_all"])
        cells += [*_peers_of(model), Cell("ops", operator_seconds, 1.5)] if model == models[0] else []
    cells += [Cell(f"{model}/generation", partial(_generation, model), 1) for model in models[:1]]
    return cells + (_more(models) if full else [])


def _whole_runs(model: str, names: Iterable[str]) -> list[Cell]:
    return [Cell(f"{model}/whole run {name}", partial(_whole, model, name), 1.5) for name in names]


def _peers_of(model: str) -> list[Cell]:
    minutes = {AS_RUN: 2.5, SAME_ENGINE: 1.5}
    return [Cell(f"{model}/peers {name}", partial(_peers, model, name, False), minutes[name]) for name in minutes]


def _losses_of(models: list[str]) -> list[Cell]:
    dtypes = ("float32", "auto")
    return [Cell(f"{model}/losses {dtype}", partial(_losses, model, dtype), 2) for model in models for dtype in dtypes]


def _more(models: list[str]) -> list[Cell]:
    cells = [Cell("layers", layer_milliseconds, 6), *_losses_of(models[1:])]
    cells += [Cell(f"{model}/generation", partial(_generation, model), 2) for model in models[1:]]
    cells += [_memory(model, row, 1.0) for model in models for row in MORE_MEMORY]
    for model in models[1:]:
        cells += [*_whole_runs(model, ["lora_all"]), *_peers_of(model)]
    for model in models:
        cells += [Cell(f"{model}/peers compiled", partial(_peers, model, SAME_ENGINE, True), 8)]
    return cells


def _each(models: list[str], *minutes: float) -> list[tuple[str, float]]:
    known = dict(zip(MODELS, minutes, strict=True))
    return [(model, known[model]) for model in models]


def _memory(model: str, row: Row, minutes: float) -> Cell:
    return Cell(f"{model}/memory {row.peer} {row.step}".strip(), partial(_measured_memory, model, row), minutes)


def _core(model: str, options: Options) -> dict:
    base, _, work = loaded(model, options.data, size=POOL)
    rounds = options.rounds or ROUNDS
    return step_level.step_seconds(
        base, work, CORE, rounds=rounds, examples=options.examples, host=_own_processes(model)
    )


def _own_processes(model: str) -> Host:
    return partial(apart, partial(model_alone, model))


def _peers(model: str, setting: str, compiled: bool, options: Options) -> dict:
    """All rows in this process: loading the model once for each of up to 17 would take longer than timing them."""
    base, _, work = loaded(model, options.data, size=POOL)
    # compiling every peer's layers takes longer than timing them: `make bench-full` does
    engine = settled_engine(base, work, compiled)
    rounds = options.rounds or PEER_ROUNDS
    return step_level.step_seconds(base, work, peers(setting), rounds=rounds, examples=BATCH, engine=engine)


def _measured_memory(model: str, row: Row, options: Options) -> dict:
    base, _, work = loaded(model, options.data)
    return peak_memory.peak_bytes(base, work, row)


def _prefix(model: str, options: Options) -> dict:
    base, _, work = loaded(model, options.data)
    rounds = options.rounds or ROUNDS
    return prefix_speed.prefix_speedup(base, work, rounds=rounds, examples=options.examples, host=_own_processes(model))


def _scoring(model: str, options: Options) -> dict:
    base, tokenizer, _ = loaded(model, options.data)
    return scoring_speed.scoring_speedup(base, tokenizer, rounds=options.rounds or ROUNDS)


def _generation(model: str, options: Options) -> dict:
    base, tokenizer, work = loaded(model, options.data)
    prompts = [example.prompt for example in task(options.data).train[: generation_speed.PROMPTS]]
    engine = settled_engine(base, work, compiled=False)
    return generation_speed.generation_seconds(
        base, tokenizer, prompts, rounds=options.rounds or PEER_ROUNDS, engine=engine
    )


def _whole(model: str, peer: str, options: Options) -> dict:
    base, tokenizer, work = loaded(model, options.data)
    examples = task(options.data).train[: len(work.rows)]
    return whole_run.whole_run_seconds(peer, base, tokenizer, examples, work)


def _losses(model: str, dtype: str, options: Options) -> dict:
    base, tokenizer, work = loaded(model, options.data, dtype)
    return losses.loss_difference(base, tokenizer, task(options.data).train[:LOSS_EXAMPLES], settled_engine(base, work))


def _profile(model: str, options: Options) -> dict:
    base, _, work = loaded(model, options.data, size=POOL)
    return {"steps": [step_profile.step_kinds(base, work, row) for row in CORE[:2]]}
