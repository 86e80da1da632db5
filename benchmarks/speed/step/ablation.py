"""What each accelerator of the engine is worth alone: one taken away at a time, a process per variant, in turns.

    python -m benchmarks.speed.step.ablation [--model SmolLM2-135M] [--dtype auto] [--compiled] [--data DIR]

Prints, for both steps, the time of a round without the accelerator over the time with all of them. CPU-only ones earn
their place with 5 % of a step on one of two processors, or with memory.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from benchmarks.peers.peer import SAME_ENGINE
from benchmarks.speed.step.loss_check import references
from benchmarks.speed.step.packaged_models import MODELS, loaded, model_folder
from benchmarks.speed.step.row_process import Job, apart
from benchmarks.speed.step.rows import Row, settled_engine
from benchmarks.speed.step.workload import POOL
from benchmarks.speed.timing import in_turns, machine, ratio
from lofit_fast.data.pack import GROUPED
from lofit_fast.models.load import load_model
from lofit_fast.training.engine import Engine

STEPS = ("step 1", "step 2")
# variant -> what is other than with all accelerators
WITHOUT: dict[str, dict[str, object]] = {
    "all": {},
    "padded rows": {"packing": False},
    "padded rows, sdpa": {"packing": False, "attention": "sdpa"},
    "padded rows, eager attention": {"packing": False, "attention": "eager"},
    "last layer whole": {"narrow": False},
    "heap as malloc has it": {"large_pages": False},
    "weights prepacked": {"prepack": True},
}


def model_in(heading: str, dtype: str):
    """The model in a dtype, for a process of its own."""
    return load_model(model_folder(heading), dtype=dtype)[0]


def variants(engine: Engine) -> dict[str, Engine]:
    """Every variant of an engine that is another one."""
    found = {name: replace(engine, **changes) for name, changes in WITHOUT.items()}
    return {name: one for name, one in found.items() if name == "all" or one != engine}


def main(
    model: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "SmolLM2-135M",
    data: Annotated[str | None, typer.Option(help="Folder with CLUTRR; default: built-in family stories.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    compiled: Annotated[bool, typer.Option(help="With compiled layers.")] = False,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 5,
    examples: Annotated[int, typer.Option(help="Examples per round.")] = 16,
) -> None:
    """Time every variant and print the ratios, with their 95 % intervals."""
    base, _, work = loaded(model, data, dtype, size=POOL)
    engine = replace(settled_engine(base, work, compiled), attention=GROUPED, narrow=True, large_pages=True)
    expected = references(base, work, STEPS)
    typer.echo(f"{machine()['processor']}, {model}, {dtype}, {'compiled' if compiled else 'not compiled'}")
    for step in STEPS:
        with ExitStack() as scopes:
            row, timed = Row("ours", SAME_ENGINE, step), {}
            for name, one in variants(engine).items():
                job = Job(row, work, one, expected[step], rounds, examples)
                served = scopes.enter_context(apart(partial(model_in, model, dtype), job))
                if served.round is None:
                    raise typer.BadParameter(f"{name}, {step}: {served.entry}")
                timed[name] = served.round
            taken = in_turns(timed, rounds=rounds, warmup=0)
        seconds = {name: [one.seconds for one in each] for name, each in taken.items()}
        for name in timed:
            typer.echo(f"{step}, {name}: {ratio(seconds[name], seconds['all'])}")


if __name__ == "__main__":
    typer.run(main)
