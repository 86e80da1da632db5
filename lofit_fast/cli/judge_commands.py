"""The commands that ask a model: `eval` and `generate`."""

import json
import sys
import warnings
from typing import Annotated

import typer

from lofit_fast.cli.adapted_model import loaded
from lofit_fast.cli.command import show
from lofit_fast.cli.options import (
    Columns,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    NewTokens,
    OptionalAdapter,
    PromptsPerBatch,
    Split,
    Strict,
    Subset,
    TaskName,
    TensorParallel,
    TrainOn,
    reading_of,
    task_name,
)

_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"

# heavy imports happen inside the commands: --help must be instant


def eval(
    model: Model,
    adapter: OptionalAdapter = None,
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    subset: Subset = None,
    columns: Columns = None,
    train_on: TrainOn = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the data draw. Default: the one the adapter was trained with, else 42.")
    ] = None,
    batch_size: PromptsPerBatch = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tensor_parallel: TensorParallel = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Exact match of greedy answers, or MC1 and MC2; of a closed set also the best-scoring answer, and the majority."""
    from lofit_fast.evaluation.judge import constrained_accuracy, judge
    from lofit_fast.patching.hub_adapters import adapter_folder
    from lofit_fast.ranks import together
    from lofit_fast.tasks import load_task, majority_accuracy
    from lofit_fast.training.run_source import data_seed_of, other_rows, source_of

    reading = reading_of(split, subset, columns, train_on)
    with together("loading the model"):
        folder = None if adapter is None else adapter_folder(adapter)
        base, tokenizer = loaded(model, folder, dtype, device, strict, tensor_parallel)
    with together("reading the data"):
        seed = data_seed_of(folder) if seed is None else seed
        examples = load_task(task_name(task, data), data, tokenizer, seed=seed, progress=not as_json, **reading)
        if said := other_rows(folder, source_of(examples, data, seed)):
            warnings.warn(said, stacklevel=2)
    progress = {"progress": not as_json}
    report = {"task": examples.name, "examples": len(examples.choices or examples.validation)}
    report |= judge(base, tokenizer, examples, batch_size=batch_size, **progress).metrics
    if examples.candidates:
        scored = constrained_accuracy(base, tokenizer, examples.validation, examples.candidates, **progress)
        report |= {"best_scoring_candidate": scored, "majority": majority_accuracy(examples)}
    show(report, as_json, f"{adapter or 'base'} on {model}")


def generate(
    model: Model,
    adapter: OptionalAdapter = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="May be repeated. Default: stdin.")] = None,
    max_new_tokens: NewTokens = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tensor_parallel: TensorParallel = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Greedy answers to prompts, one per line of standard input unless given."""
    from lofit_fast.evaluation.judge import generate_answers
    from lofit_fast.ranks import together, told

    # the processes of a launch have one standard input between them
    prompts = prompt or told(_lines)
    if not prompts:
        raise ValueError("no prompt: expected --prompt, or lines on standard input")
    with together("loading the model"):
        base, tokenizer = loaded(model, adapter, dtype, device, strict, tensor_parallel)
    answers = generate_answers(base, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=not as_json)
    if as_json:
        print(json.dumps([{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]))
        return
    for text, answer in zip(prompts, answers, strict=True):
        # not through rich: a model's words are neither wrapped nor searched for markup and emoji
        print(f"{text}\033[1m{answer}\033[0m" if sys.stdout.isatty() else text + answer)


def _lines() -> list[str]:
    """The lines of standard input that hold something."""
    try:
        lines = list(sys.stdin)
        # some editors begin a text with a mark
        lines[:1] = [line.removeprefix(_MARK) for line in lines[:1]]
        return [line.rstrip("\n") for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: expected UTF-8 text: {error}") from error
