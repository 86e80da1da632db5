"""The command `heads`: what an adapter's heads write and where they look, in a table and on a page."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lofit_fast.cli.command import out
from lofit_fast.cli.options import (
    Adapter,
    AtLeast,
    Columns,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    Split,
    Subset,
    TaskName,
    check_idle,
    named_path,
    reading_of,
    task_name,
)

# heavy imports happen inside the command: --help must be instant
_MOST_TOKENS, _MOST_READ = 96, 1024
_PICTURES = 4


def heads(
    model: Model,
    adapter: Adapter,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Another adapter of the same base; may be repeated.", metavar="DIR"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=named_path, help="An HTML page with pictures.", metavar="FILE"),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="Read at its end. Default: the first prompt that the adapter's run has held out."
        ),
    ] = None,
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    subset: Subset = None,
    columns: Columns = None,
    tokens: Annotated[int, typer.Option(help="Tokens to name per head, of either kind."), AtLeast(1)] = 6,
    pictures: Annotated[
        int | None, typer.Option(help=f"Heads whose attention the page shows. Default: {_PICTURES}."), AtLeast(1)
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show what the offset of each head writes: the next tokens that it makes likelier and less likely.

    The page adds the map of the heads and where they look; --compare adds how much adapters have in common.
    """
    from lofit_fast.cli.adapted_model import loaded
    from lofit_fast.data.encode import encode_prompt
    from lofit_fast.patching.patched import handle_of
    from lofit_fast.selection.adapter_overlap import offsets_in, overlaps
    from lofit_fast.selection.attention_maps import attention_maps
    from lofit_fast.selection.heads_page import HeadsReport, of_scales, write_page
    from lofit_fast.selection.written_tokens import written_tokens

    if prompt is not None:
        reading = {"--task": task, "--data": data, "--split": split, "--subset": subset, "--columns": columns}
        check_idle("--prompt is what is read", reading)
    if output is None:
        check_idle("without --output there is no page", {"--pictures": pictures})
    others = _others(adapter, compare or [])
    base, tokenizer = loaded(model, adapter, dtype, device)
    handle = handle_of(base)
    text = prompt if prompt is not None else _first_prompt(adapter, task, data, tokenizer, split, subset, columns)
    ids = encode_prompt(tokenizer, text)
    if output is not None and len(ids) > _MOST_READ:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and the page shows attention over {_MOST_READ} at most: give a shorter "
            "--prompt, or leave --output out"
        )
    written = written_tokens(handle, tokenizer, ids, tokens)
    shape = (max(p.layer for p in handle.projections) + 1, max(p.n_heads for p in handle.projections))
    every = {str(adapter): offsets_in(handle.adapter())} | _offsets(others, handle)
    scaled = sum(len(layer.heads("scale")) for layer in handle.layers.values())
    common = overlaps(every, sum(p.n_heads for p in handle.projections))
    if output is not None:
        maps = attention_maps(handle, ids, [one.head for one in written[: pictures or _PICTURES]])
        # of a long prompt, what is beside the answer is shown
        maps = {head: weights[-_MOST_TOKENS:, -_MOST_TOKENS:] for head, weights in maps.items()}
        names = [tokenizer.decode([token]) for token in ids[-_MOST_TOKENS:]]
        before = len(ids) - len(names)
        report = HeadsReport(f"{adapter} on {model}", text, names, shape, written, maps, common, scaled, before)
        write_page(report, output)
    if as_json:
        heads_found, overlaps_found = [asdict(one) for one in written], [asdict(one) for one in common]
        found = {"prompt": text, "heads": heads_found, "heads_scaled": scaled, "overlaps": overlaps_found}
        print(json.dumps(found | ({} if output is None else {"page": str(output)})))
        return
    out.print(_written_table(written, f"what {adapter} writes on {model}"))
    if scaled:
        out.print(of_scales(scaled))
    if common:
        out.print(_overlap_table(common))
    if output is not None:
        out.print(f"page: {output}", highlight=False)


def _others(adapter: str, compare: list[str]) -> list[str]:
    """The adapters to compare with. Raises ValueError for one that is named twice."""
    names = [str(adapter), *map(str, compare)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--compare: {', '.join(sorted(twice))} is named more than once, expected different adapters")
    return compare


def _offsets(folders: list[str], handle) -> dict:
    """name -> head -> offset, of folders of the same base. Raises ValueError for one of another shape, or of scales."""
    from lofit_fast.patching.hub_adapters import adapter_folder
    from lofit_fast.patching.storage import check_fits, read_adapter
    from lofit_fast.patching.weight_sample import check_base
    from lofit_fast.selection.adapter_overlap import offsets_in

    found = {}
    for folder in folders:
        adapter = read_adapter(adapter_folder(folder))
        check_fits(adapter, handle.fingerprint)
        check_base(handle.model, adapter.base_digest, f"the adapter in {folder}", adapter.base_model, strict=False)
        found[str(folder)] = offsets_in(adapter)
    return found


def _first_prompt(adapter, task, data, tokenizer, split, subset, columns) -> str:
    from lofit_fast.patching.hub_adapters import adapter_folder
    from lofit_fast.tasks import load_task
    from lofit_fast.training.run_source import data_seed_of, other_rows, source_of

    name, folder = task_name(task, data), adapter_folder(adapter)
    seed = data_seed_of(folder)
    examples = load_task(name, data, tokenizer, seed=seed, progress=False, **reading_of(split, subset, columns))
    if said := other_rows(folder, source_of(examples, data, seed)):
        warnings.warn(said, stacklevel=2)
    given = examples.validation or examples.choices or examples.train
    if not given:
        raise ValueError(f"the task {name} has no example to read: give a --prompt")
    return given[0].prompt


def _written_table(written, title: str) -> Table:
    table = Table("head", "length", "of the stream", "raises", "lowers", title=title)
    for one in written:
        named = (Text(" ".join(repr(token) for token, _ in pairs)) for pairs in (one.promoted, one.suppressed))
        table.add_row(f"{one.head[0]}.{one.head[1]}", f"{one.norm:.3g}", f"{one.part:.1%}", *named)
    return table


def _overlap_table(common) -> Table:
    table = Table("adapters", "shared heads", "by chance", "Jaccard", "mean cosine", title="beside other adapters")
    for one in common:
        cosine = "-" if one.cosine is None else f"{one.cosine:.2f}"
        names = Text(" and ".join(one.names))
        table.add_row(
            names,
            f"{one.shared} of {one.heads[0]} and {one.heads[1]}",
            f"{one.by_chance:.1f}",
            f"{one.jaccard:.2f}",
            cosine,
        )
    return table
