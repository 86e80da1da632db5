"""The command `select`: heads chosen one way or several, and what each way costs."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lofit_fast.cli.command import out
from lofit_fast.cli.options import (
    L1,
    BatchSize,
    Columns,
    Data,
    Device,
    Dtype,
    Json,
    MinLayer,
    Model,
    Positions,
    Seed,
    SelectEpochs,
    SelectExamples,
    SelectLr,
    Split,
    Subset,
    TaskName,
    TensorParallel,
    Top,
    TrainOn,
    TrainSize,
    flags_of,
    named_path,
    reading_of,
    recipe_of,
    task_name,
)

# heavy imports happen inside the command: --help must be instant
METHODS = ("lofit", "random", "bias_norm", "iti_probe", "probing_layers", "saliency", "early_stop")
PROBING = ("iti_probe", "probing_layers")


def select(
    model: Model,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"{', '.join(METHODS)}; may be repeated, or all. Default: saliency."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=named_path,
            help="heads.json, for train --heads; of several methods a folder of them.",
            metavar="PATH",
        ),
    ] = None,
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    subset: Subset = None,
    columns: Columns = None,
    train_on: TrainOn = None,
    train_size: TrainSize = None,
    top: Top = None,
    min_layer: MinLayer = None,
    select_examples: SelectExamples = None,
    select_lr: SelectLr = None,
    l1: L1 = None,
    select_epochs: SelectEpochs = None,
    batch_size: BatchSize = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            parser=named_path,
            help="A heads.json to compare with. Default: lofit's choice, if it is a method.",
            metavar="FILE",
        ),
    ] = None,
    positions: Positions = None,
    seed: Seed = 42,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tensor_parallel: TensorParallel = False,
    as_json: Json = False,
) -> None:
    """Choose heads without tuning them: by LoFiT's step 1, by what it is compared with, or by one pass of gradients.

    Beside the heads stand the seconds each method took and how much of its choice is the reference's (Jaccard). The
    methods that train keep a run in a folder beside the heads, and go on from it.
    """
    from lofit_fast.config import LOOKING_ONCE, check_choice
    from lofit_fast.heads import jaccard, read_heads
    from lofit_fast.models.load import load_model
    from lofit_fast.ranks import by_first, together
    from lofit_fast.selection.methods import SELECTORS
    from lofit_fast.tasks import load_task

    names = _methods(method)
    if tensor_parallel and (probing := [name for name in names if name in PROBING]):
        raise ValueError(
            f"--tensor-parallel is not for {', '.join(probing)}, which read all heads in one process: expected "
            f"{', '.join(name for name in METHODS if name not in PROBING)}"
        )
    _check_output(output, names)
    name = task_name(task, data)
    given = {"select_lr": select_lr, "l1": l1, "select_epochs": select_epochs, "batch_size": batch_size}
    given["positions"] = positions
    check_choice(flags_of({**given, "select_examples": select_examples}), names)
    if select_examples is not None:
        given |= {"select": LOOKING_ONCE[0], "select_examples": select_examples}
    recipe = recipe_of(name, seed, top, min_layer=min_layer, **given)
    reading = reading_of(split, subset, columns, train_on)
    expected = None if reference is None else [tuple(pair) for pair in read_heads(reference)]
    with together("loading the model"):
        base, tokenizer = load_model(model, dtype=dtype, device=device, tensor_parallel=tensor_parallel)
    with together("reading the data"):
        examples = load_task(name, data, tokenizer, train_size=train_size, seed=seed, progress=not as_json, **reading)
    found = {}
    with _scratch() as scratch:
        for key in names:
            path = _file(output, key, len(names))
            work = scratch / key if path is None else path.with_name(f"{path.stem}-step1")
            options = {"output_dir": work, "seed": seed, "progress": not as_json}
            found[key] = SELECTORS[key](base, tokenizer, examples, recipe, **options)
            if path is not None:
                about = {"method": key, "model": model, "task": examples.name}
                by_first(lambda path=path, chosen=found[key], about=about: _write(path, chosen, about))
    if expected is None and "lofit" in found:
        expected = found["lofit"].heads
    rows = [{"method": key, "seconds": s.seconds, "heads": s.heads} for key, s in found.items()]
    for row in rows:
        row["overlap"] = None if expected is None else jaccard(row["heads"], expected)
    if as_json:
        print(json.dumps({"model": model, "task": examples.name, "top": recipe.top, "methods": rows}))
        return
    out.print(_table(rows, f"heads for {examples.name} on {model}"))


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that is gone afterwards: one for all processes of a launch, of the first."""
    from lofit_fast.ranks import gathered, told

    with ExitStack() as stack:
        yield Path(told(lambda: stack.enter_context(tempfile.TemporaryDirectory())))
        # all have read what is in it
        gathered(None)


def _methods(asked: list[str] | None) -> list[str]:
    asked = asked or ["saliency"]
    if unknown := sorted(set(asked) - {"all", *METHODS}):
        raise ValueError(f"unknown method {', '.join(unknown)}: expected all or some of {', '.join(METHODS)}")
    return list(METHODS) if "all" in asked else list(dict.fromkeys(asked))


def _check_output(output: Path | None, names: list[str]) -> None:
    """Raise ValueError, before hours of work, for a place that the heads cannot be written to."""
    if output is None or not output.exists():
        return
    if len(names) == 1 and not output.is_file():
        raise ValueError(f"--output {output} is no file: expected the heads.json to write")
    if len(names) > 1 and not output.is_dir():
        raise ValueError(f"--output {output} is no folder: expected one for the heads of {len(names)} methods")
    for path in (_file(output, name, len(names)) for name in names):
        if path.exists() and not _may_be_replaced(path):
            raise ValueError(f"--output {path} is there, as something else: expected a new file, or one of heads")


def _may_be_replaced(path: Path) -> bool:
    """Whether a file is empty or holds heads, and not a model's config, say."""
    from lofit_fast.files import read_json

    try:
        content = read_json(path) if path.stat().st_size else {"heads": []}
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "heads" in content


def _file(output: Path | None, method: str, methods: int) -> Path | None:
    if output is None:
        return None
    return output if methods == 1 else output / f"{method}.json"


def _write(path: Path, selection, about: dict[str, str]) -> None:
    from lofit_fast.heads import scores_as_json
    from lofit_fast.sealed import write_sealed

    scores = scores_as_json(selection.scores)
    write_sealed(path, {"heads": selection.heads, "scores": scores, "seconds": selection.seconds, **about})


def _table(rows: list[dict], title: str) -> Table:
    table = Table("method", "seconds", "overlap", "heads, best first", title=title)
    for row in rows:
        best = " ".join(f"{layer}.{head}" for layer, head in row["heads"][:6])
        more = " ..." if len(row["heads"]) > 6 else ""
        overlap = "" if row["overlap"] is None else f"{row['overlap']:.2f}"
        table.add_row(row["method"], f"{row['seconds']:.1f}", overlap, best + more)
    return table
