"""The command `select`: heads chosen one way or several, and what each way costs. Registered in `cli.py`."""

import json
import math
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lofit_fast.config import RECIPES, Recipe

# heavy imports happen inside the command: --help must be instant
METHODS = ("lofit", "random", "bias_norm", "iti_probe", "probing_layers", "saliency", "early_stop")


def select(
    model: Annotated[str, typer.Option("--model", "-m", help="As for train.", metavar="NAME")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"{', '.join(METHODS)}; may be repeated, or all. Default: saliency."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="heads.json, for train --heads; of several methods a folder of them."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="As for train.", metavar="NAME")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="As for train.", metavar="PATH")] = None,
    train_size: Annotated[int | None, typer.Option(help="Use this many training examples.")] = None,
    top: Annotated[str | None, typer.Option(help="Heads to choose: a count (32) or a fraction (0.1).")] = None,
    min_layer: Annotated[int | None, typer.Option(help="Choose heads of this layer and above only.")] = None,
    select_lr: Annotated[float | None, typer.Option(help="Learning rate of the methods that train.")] = None,
    l1: Annotated[float | None, typer.Option(help="Weight of the L1 penalty on the scales.")] = None,
    select_epochs: Annotated[int | None, typer.Option(help="Epochs of the methods that train.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per batch.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A heads.json to compare with. Default: lofit's choice, if it is a method.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 42,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Choose heads without tuning them: by LoFiT's step 1, by what it is compared with, or by one pass of gradients.

    Beside the heads stand the seconds each method took and how much of its choice is the reference's (Jaccard). The
    methods that train keep a run in a folder beside the heads, and go on from it.
    """
    from lofit_fast.heads import jaccard, read_heads
    from lofit_fast.models.load import load_model
    from lofit_fast.selection.methods import SELECTORS
    from lofit_fast.tasks import load_task

    names = _methods(method)
    name = task or ("kinship" if data is None else "completion")
    given = {"select_lr": select_lr, "l1": l1, "select_epochs": select_epochs, "batch_size": batch_size}
    given |= {"min_layer": min_layer, "top": None if top is None else parse_top(top)}
    chosen = {key: value for key, value in given.items() if value is not None}
    recipe = Recipe(**{**RECIPES.get(name, {}), "seed": seed, **chosen})
    expected = None if reference is None else [tuple(pair) for pair in read_heads(reference)]
    base, tokenizer = load_model(model, dtype=dtype, device=device)
    examples = load_task(name, data, tokenizer, train_size=train_size, seed=seed)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for key in names:
            path = _file(output, key, len(names))
            work = Path(scratch) / key if path is None else path.with_name(f"{path.stem}-step1")
            options = {"output_dir": work, "seed": seed, "progress": not as_json}
            found[key] = SELECTORS[key](base, tokenizer, examples, recipe, **options)
            if path is not None:
                _write(path, found[key], {"method": key, "model": model, "task": examples.name})
    if expected is None and "lofit" in found:
        expected = found["lofit"].heads
    rows = [{"method": key, "seconds": s.seconds, "heads": s.heads} for key, s in found.items()]
    for row in rows:
        row["overlap"] = None if expected is None else jaccard(row["heads"], expected)
    if as_json:
        print(json.dumps({"model": model, "task": examples.name, "top": recipe.top, "methods": rows}))
        return
    Console().print(_table(rows, f"heads for {examples.name} on {model}"))


def parse_top(text: str) -> int | float:
    """ "32" -> 32 heads, "0.1" -> a tenth of them. Raises ValueError for anything else."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected --top to be a count like 32 or a fraction like 0.1, got {text!r}") from None


def _methods(asked: list[str] | None) -> list[str]:
    asked = asked or ["saliency"]
    if unknown := sorted(set(asked) - {"all", *METHODS}):
        raise ValueError(f"unknown method {', '.join(unknown)}: expected all or some of {', '.join(METHODS)}")
    return list(METHODS) if "all" in asked else list(dict.fromkeys(asked))


def _file(output: Path | None, method: str, methods: int) -> Path | None:
    if output is None:
        return None
    return output if methods == 1 else output / f"{method}.json"


def _write(path: Path, selection, about: dict[str, str]) -> None:
    from lofit_fast.files import write_json

    # JSON has no infinity
    scores = [[value if math.isfinite(value) else None for value in row] for row in selection.scores.tolist()]
    write_json(path, {"heads": selection.heads, "scores": scores, "seconds": selection.seconds, **about})


def _table(rows: list[dict], title: str) -> Table:
    table = Table("method", "seconds", "overlap", "heads, best first", title=title)
    for row in rows:
        best = " ".join(f"{layer}.{head}" for layer, head in row["heads"][:6])
        more = " ..." if len(row["heads"]) > 6 else ""
        overlap = "" if row["overlap"] is None else f"{row['overlap']:.2f}"
        table.add_row(row["method"], f"{row['seconds']:.1f}", overlap, best + more)
    return table
