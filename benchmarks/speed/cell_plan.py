"""Which cells there are, in order of importance. docs/benchmark.md says where their minutes come from."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from benchmarks.peers.peer import AS_RUN, INT8, SAME_ENGINE, TUNED_STOCK
from benchmarks.peers.table import TIMED
from benchmarks.speed.cells import Cell, Options
from benchmarks.speed.op.layer_level import layer_milliseconds
from benchmarks.speed.op.op_level import operator_seconds
from benchmarks.speed.step import (
    answer_speed,
    fast_run,
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
from benchmarks.speed.step.packaged_models import MODELS, alone_with_tokenizer, loaded, model_alone
from benchmarks.speed.step.row_process import Host, apart
from benchmarks.speed.step.rows import Row, settled_engine
from benchmarks.speed.step.workload import BATCH, POOL, task

STEPS = ("step 1", "step 2")
# the two sides of every ratio in the summary; the floor and LoRA do not depend on the step
CORE = (
    *(Row("ours", setting, step) for setting in (SAME_ENGINE, INT8) for step in STEPS),
    Row("floor", SAME_ENGINE),
    # a hook in our engine says what of the gain is the op's, and what the engine's
    *(Row("hook", setting, step) for setting in (AS_RUN, SAME_ENGINE) for step in STEPS),
    Row("lora_all", AS_RUN),
)
# ours beside the peers in the loop of a careful user; without his care they are among the steps
CAREFUL = (Row("ours", SAME_ENGINE, "step 2"), Row("hook", TUNED_STOCK, "step 2"), Row("lora_all", TUNED_STOCK))
# the second model's steps are the longest cell: three rounds are enough to see ratios of 5 and more
FIRST, SECOND = MODELS
STEP_ROUNDS = {FIRST: 5, SECOND: 3}
PREFIX_ROUNDS, SCORING_ROUNDS, PEER_ROUNDS, GENERATION_ROUNDS, ANSWER_ROUNDS = 5, 3, 2, 2, 5
# examples of the part of a stock loop by which its whole run is counted up
FAST_PART = 32
LOSS_EXAMPLES = 16
# minutes of `make bench` in all: below its limit of 75, for a machine that is a little slower than the one planned for
PLANNED_MINUTES = 70.0


def memory_rows(step: str) -> tuple[Row, Row]:
    """The two sides of the memory ratio."""
    return Row("hook", AS_RUN, step), Row("ours", SAME_ENGINE, step)


MORE_MEMORY = (Row("floor", SAME_ENGINE), *(Row(name, AS_RUN) for name in ("lora", "lora_all", "ia3", "beft")))


def peers(setting: str, steps: Iterable[str] = STEPS) -> list[Row]:
    """Every peer in one setting, at each of the steps where they differ."""
    rows = []
    for name, peer in TIMED.items():
        rows += [Row(name, setting, step) for step in (steps if peer.computes == "ours" else ("",))]
    return rows


def plan(full: bool, models: Iterable[str] = tuple(MODELS)) -> list[Cell]:
    """The cells of `make bench`, or of `make bench-full`, by falling importance.

    `make bench` measures the first model in every way and the second in the two that matter most: steps and memory. All
    its cells fit into PLANNED_MINUTES on two cores without matrix instructions.
    """
    models = [model for model in MODELS if model in models]
    cells = [cell for model in models for cell in _headline(model)]
    cells += [cell for model in models[:1] for cell in _whole_of(model)]
    return cells + (_more(models) if full else [])


def _headline(model: str) -> list[Cell]:
    """Steps, and memory at the step where our share was the larger: at both for the first model."""
    if model == FIRST:
        memory = zip((row for step in STEPS for row in memory_rows(step)), (0.5, 1.1, 0.45, 1.3), strict=True)
    else:
        memory = zip(memory_rows("step 2"), (0.8, 1.05), strict=True)
    steps = Cell(f"{model}/steps", partial(_core, model), 14.7 if model == FIRST else 17.6)
    memory = [_memory(model, row, minutes) for row, minutes in memory]
    answers = Cell(f"{model}/answer only", partial(_answers, model), 2)
    return [steps, *memory, answers, Cell(f"{model}/fast run", partial(_fast_run, model, "answer"), 5)]


def _whole_of(model: str) -> list[Cell]:
    """All that there is beside the headline, once."""
    return [
        Cell(f"{model}/careful steps", partial(_careful, model), 5),
        Cell(f"{model}/prefix cache", partial(_prefix, model), 2.5),
        Cell(f"{model}/scoring", partial(_scoring, model), 1),
        Cell(f"{model}/sweep", partial(sweep_speed.sweep_runs_per_hour, model), 3.4),
        Cell(f"{model}/losses auto", partial(_losses, model, "auto"), 2),
        _whole_run(model, "ours", 0.6),
        _whole_run(model, "hook", 0.95),
        _peer_cell(model, SAME_ENGINE, ("step 1",), 2.1),
        Cell("ops", operator_seconds, 0.75),
    ]


def _more(models: list[str]) -> list[Cell]:
    """What `make bench-full` adds."""
    cells = [Cell("layers", layer_milliseconds, 6)]
    for model in models:
        if model != FIRST:
            cells += [_memory(model, row, 1) for row in memory_rows("step 1")]
        if model != models[0]:
            cells += [cell for cell in _whole_of(model) if cell.name != "ops"]
        cells += [Cell(f"{model}/losses float32", partial(_losses, model, "float32"), 2.7)]
        cells += [Cell(f"{model}/fast run all positions", partial(_fast_run, model, "all"), 7)]
        cells += [_whole_run(model, "lora_all", 1.4), _peer_cell(model, AS_RUN, STEPS, 5.3)]
        cells += [Cell(f"{model}/generation", partial(_generation, model), 1)]
        cells += [Cell(f"{model}/profile", partial(_profile, model), 1.6)]
        cells += [_memory(model, row, 1) for row in MORE_MEMORY]
        cells += [Cell(f"{model}/peers compiled", partial(_peers, model, SAME_ENGINE, STEPS, True), 8)]
    return cells


def _whole_run(model: str, name: str, minutes: float) -> Cell:
    return Cell(f"{model}/whole run {name}", partial(_whole, model, name), minutes)


def _peer_cell(model: str, setting: str, steps: Iterable[str], minutes: float) -> Cell:
    return Cell(f"{model}/peers {setting}", partial(_peers, model, setting, steps, False), minutes)


def _memory(model: str, row: Row, minutes: float) -> Cell:
    return Cell(f"{model}/memory {row.peer} {row.step}".strip(), partial(_measured_memory, model, row), minutes)


def _core(model: str, options: Options) -> dict:
    base, _, work = loaded(model, options.data, size=POOL)
    rounds = options.rounds or STEP_ROUNDS[model]
    return step_level.step_seconds(
        base, work, CORE, rounds=rounds, examples=options.examples, host=_own_processes(model)
    )


def _careful(model: str, options: Options) -> dict:
    base, _, work = loaded(model, options.data, size=POOL)
    rounds, host = options.rounds or STEP_ROUNDS[model], _own_processes(model)
    return step_level.step_seconds(base, work, CAREFUL, rounds=rounds, examples=options.examples, host=host)


def _answers(model: str, options: Options) -> dict:
    base, _, work = loaded(model, options.data)
    return answer_speed.answer_speedup(base, work, rounds=options.rounds or ANSWER_ROUNDS, examples=options.examples)


def _fast_run(model: str, positions: str, options: Options) -> dict:
    _, _, work = loaded(model, options.data, size=fast_run.EXAMPLES)
    of_task = task(options.data, fast_run.EXAMPLES).train[: len(work.rows)]
    inputs = fast_run.Loaded(partial(alone_with_tokenizer, model), of_task, work)
    return fast_run.fast_run_seconds(inputs, part=FAST_PART, positions=positions)


def _own_processes(model: str) -> Host:
    return partial(apart, partial(model_alone, model))


def _peers(model: str, setting: str, steps: Iterable[str], compiled: bool, options: Options) -> dict:
    """All rows in this process: loading the model once for each of up to 15 would take longer than timing them."""
    base, _, work = loaded(model, options.data, size=POOL)
    # compiling every peer's layers takes longer than timing them: `make bench-full` does
    engine = settled_engine(base, work, compiled)
    rounds = options.rounds or PEER_ROUNDS
    return step_level.step_seconds(base, work, peers(setting, steps), rounds=rounds, examples=BATCH, engine=engine)


def _measured_memory(model: str, row: Row, options: Options) -> dict:
    base, _, work = loaded(model, options.data)
    return peak_memory.peak_bytes(base, work, row)


def _prefix(model: str, options: Options) -> dict:
    base, _, work = loaded(model, options.data)
    rounds = options.rounds or PREFIX_ROUNDS
    return prefix_speed.prefix_speedup(base, work, rounds=rounds, examples=options.examples, host=_own_processes(model))


def _scoring(model: str, options: Options) -> dict:
    base, tokenizer, _ = loaded(model, options.data)
    return scoring_speed.scoring_speedup(base, tokenizer, rounds=options.rounds or SCORING_ROUNDS)


def _generation(model: str, options: Options) -> dict:
    base, tokenizer, work = loaded(model, options.data)
    prompts = [example.prompt for example in task(options.data).train[: generation_speed.PROMPTS]]
    engine = settled_engine(base, work, compiled=False)
    return generation_speed.generation_seconds(
        base, tokenizer, prompts, rounds=options.rounds or GENERATION_ROUNDS, engine=engine
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
