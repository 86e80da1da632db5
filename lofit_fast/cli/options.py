"""The options that commands share, and how numbers of heads are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from lofit_fast.files import given_path
from lofit_fast.tasks.row_source import check_columns


@dataclass(frozen=True)
class AtLeast:
    """The least value of an option that counts something."""

    least: int


Model = Annotated[
    str,
    typer.Option("--model", "-m", help="smollm2, gemma3-270m, a folder, a .gguf file, or a hub id.", metavar="NAME"),
]
_ADAPTER = "Adapter folder, hub id (user/name, user/name@revision), or a checkpoint of lo-fit or ITI"
Adapter = Annotated[str, typer.Option("--adapter", "-a", help=f"{_ADAPTER}.", metavar="NAME")]
OptionalAdapter = Annotated[
    str | None, typer.Option("--adapter", "-a", help=f"{_ADAPTER}; without it, the base model.", metavar="NAME")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse an adapter that was trained on other base weights. Default: warn.")
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task", "-t", help="kinship, clutrr, mquake, ... (docs/guide.md). Default: by --data.", metavar="NAME"
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="A file (.jsonl, .json, .csv, .tsv, .parquet), folder or hub data set (owner/name) of prompt/completion, "
        "messages, or prompt/chosen/rejected; the folder of a published task.",
        metavar="PATH",
    ),
]
Split = Annotated[
    str | None, typer.Option("--split", help="Of a hub data set or a folder. Default: train.", metavar="NAME")
]
Subset = Annotated[str | None, typer.Option("--subset", help="Configuration of a hub data set.", metavar="NAME")]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="Which columns to read: prompt=question,completion=answer. Names: prompt, completion, messages, chosen, "
        "rejected.",
        metavar="NAME=COLUMN,...",
    ),
]
TrainOn = Annotated[
    str | None,
    typer.Option(help="Of messages, learn 'all' turns of the assistant (the default) or the 'last'.", metavar="TURNS"),
]
TrainSize = Annotated[int | None, typer.Option(help="Use this many training examples."), AtLeast(1)]
Top = Annotated[str | None, typer.Option(help="Heads to keep: a count (32) or a fraction (0.1).")]
MinLayer = Annotated[int | None, typer.Option(help="Keep heads of this layer and above only."), AtLeast(0)]
SelectLr = Annotated[float | None, typer.Option(help="Learning rate of step 1, and of the methods that train.")]
L1 = Annotated[float | None, typer.Option(help="Weight of the L1 penalty on the scales.")]
SelectEpochs = Annotated[int | None, typer.Option(help="Epochs of step 1, and of the methods that train."), AtLeast(0)]
TuneEpochs = Annotated[int | None, typer.Option(help="Epochs of step 2."), AtLeast(0)]
BatchSize = Annotated[int | None, typer.Option(help="Examples per optimizer step."), AtLeast(1)]
PromptsPerBatch = Annotated[int | None, typer.Option(help="Prompts to answer per batch. Default: 32."), AtLeast(1)]
NewTokens = Annotated[int, typer.Option(help="Longest answer in tokens."), AtLeast(1)]
AccumulationSteps = Annotated[int | None, typer.Option(help="Micro-batches per optimizer step."), AtLeast(1)]
MaxLength = Annotated[int | None, typer.Option(help="Longest example in tokens."), AtLeast(1)]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", help="Processes that train at the same time, each with a base."), AtLeast(1)
]
Together = Annotated[int, typer.Option(help="Runs whose second steps share each pass.", metavar="M"), AtLeast(1)]
Positions = Annotated[
    str | None,
    typer.Option(help="Tokens to act on: 'all' (default) or 'answer', from the last of the prompt on."),
]
Seed = Annotated[int, typer.Option(help="Of the data draw, the initial vectors and the order.")]
Select = Annotated[
    str | None,
    typer.Option(
        help="How step 1 chooses heads: lofit (the paper's; the default), early_stop, bias_norm, saliency (one pass of "
        "gradients) or random.",
        metavar="WAY",
    ),
]
SelectExamples = Annotated[int | None, typer.Option(help="Examples that saliency looks at. Default: all."), AtLeast(1)]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Heads by one pass of gradients over 128 examples instead of step 1, frozen products in int8 and a "
        "prefix cache where rules say that they pay. Results differ; docs/results/fast.md has what is measured of it. "
        "Every option given beside it wins.",
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
TensorParallel = Annotated[
    bool,
    typer.Option(
        "--tensor-parallel",
        help="Under torchrun: the processes hold one base together, each some of its heads, where it does not fit one "
        "device. Each computes with whole batches. Their number must divide the heads.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def check_counts(function: Callable, given: Mapping[str, object]) -> None:
    """Raise ValueError for a count below the least that a command's option takes. given: its options, by name."""
    for name, hint in get_type_hints(function, include_extras=True).items():
        of = given.get(name)
        for least in (mark.least for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, AtLeast)):
            for count in of if isinstance(of, list) else [of]:
                if count is not None and count < least:
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option}: got {count}, expected a whole number from {least}")


def named_path(text: str) -> Path:
    """An option's path. Raises BadParameter for an empty name, which would stand for the working folder."""
    try:
        return given_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def check_output(output: Path | None, dry_run: bool) -> None:
    """Raise ValueError where a command would write and has not been told where to."""
    if output is None and not dry_run:
        raise ValueError("got no --output, expected the folder to write to: only --dry-run needs none")


def check_idle(why: str, given: Mapping[str, object]) -> None:
    """Raise ValueError for options that were given and have no use. given: option -> its value. why: they have none."""
    if idle := [option for option, value in given.items() if value is not None and value is not False]:
        named = " or ".join(idle)
        raise ValueError(f"{why}, so there is nothing for {named} to do: expected the command without")


def parse_heads(text: str | None, option: str = "heads", all_is_known: bool = True) -> str | int | float | None:
    """ "all", "32" -> 32 heads, "0.1" -> a tenth of them. Raises ValueError naming the option for anything else."""
    if text is None or (text == "all" and all_is_known):
        return text
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    known = "'all', " if all_is_known else ""
    raise ValueError(f"expected {option} to be {known}a count like 32 or a fraction like 0.1, got {text!r}")


def parse_top(text: str | None) -> int | float | None:
    """--top: a count or a fraction of the heads. Raises ValueError for anything else."""
    return parse_heads(text, "--top", all_is_known=False)


def parse_gb(text: str) -> float | str:
    """--prefix-cache-gb: "auto", or a number. Raises ValueError for anything else."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ValueError(f"expected --prefix-cache-gb to be a number or 'auto', got {text!r}") from None


def parse_columns(text: str) -> dict[str, str]:
    """ "prompt=question,completion=answer" -> {"prompt": "question", "completion": "answer"}.

    Raises ValueError for anything else, and for names or columns that are there twice or unknown.
    """
    pairs = [tuple(part.strip() for part in pair.partition("=")) for pair in text.split(",")]
    if not all(name and sign and column for name, sign, column in pairs):
        raise ValueError(f"expected --columns like prompt=question,completion=answer, got {text!r}")
    columns = {name: column for name, _, column in pairs}
    if len(columns) < len(pairs):
        raise ValueError(f"expected every name once in --columns, got {text!r}")
    check_columns(columns)
    return columns


def reading_of(
    split: str | None, subset: str | None, columns: str | None, train_on: str | None = None
) -> dict[str, object]:
    """What was given of how to read --data, as options of `load_task`. Raises ValueError as `parse_columns`."""
    renamed = None if columns is None else parse_columns(columns)
    read = {"split": split, "subset": subset, "columns": renamed, "train_on": train_on}
    return {key: value for key, value in read.items() if value is not None}


def flags_of(given: Mapping[str, object]) -> dict[str, str]:
    """By setting that was given, not None, its option."""
    return {name: f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None}


def recipe_of(task: str, seed: int, top: str | None, fast: bool = False, **given):
    """The task's recipe with what was given on the command line instead; None stands for not given.

    fast: whether what neither says is the fast preset's.

    Raises what `Recipe` raises, and ValueError for a top that is no number of heads.
    """
    from lofit_fast.config import RECIPES, Recipe, fast_settings

    of_task = RECIPES.get(task, {})
    chosen = {key: value for key, value in {**given, "top": parse_top(top)}.items() if value is not None}
    return Recipe(seed=seed, **(fast_settings(chosen, of_task) if fast else {**of_task, **chosen}))


def task_name(task: str | None, data: str | None) -> str:
    """The task asked for: by name, else completions of the given data, else the one that needs none."""
    return task or ("kinship" if data is None else "completion")
