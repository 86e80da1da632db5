"""The commands about adapter folders themselves: `convert-adapter`, and `push`."""

from pathlib import Path
from typing import Annotated

import typer

from lofit_fast.cli.adapted_model import loaded
from lofit_fast.cli.command import show
from lofit_fast.cli.options import Adapter, Json, Model, Strict, check_idle, named_path

# heavy imports happen inside the commands: --help must be instant


def convert_adapter(
    model: Model,
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint", "-c", help="Folder, or file of weights, that lo-fit or ITI saved.", metavar="PATH"
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=named_path, help="Adapter folder to write.", metavar="DIR")
    ],
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write the adapter that is in somebody else's checkpoint: lo-fit's attn_A and attn_v, or merged biases."""
    handle = _handle(model, checkpoint, strict)
    handle.save(output)
    show(_facts(handle) | {"output": str(output)}, as_json, "adapter")


def push(
    model: Model,
    adapter: Adapter,
    repo: Annotated[str, typer.Option("--repo", "-r", help="The hub's repository, user/name.", metavar="NAME")],
    license: Annotated[str | None, typer.Option(help="Of the vectors, such as apache-2.0.", metavar="NAME")] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            parser=named_path, help="Run folder for the card. Default: the one that the adapter lies in.", metavar="DIR"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=named_path, help="Keep what is pushed in this folder.", metavar="DIR"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.", metavar="NAME")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write --output, and push nothing.")] = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Put an adapter on the hub, with a model card of its base, data, recipe, results and heads."""
    if dry_run:
        check_idle("--dry-run pushes nothing", {"--revision": revision, "--private": private})
    around = Path(adapter).parent
    run = around if run is None and (around / "summary.json").is_file() else run
    handle = _handle(model, adapter, strict)
    where = {"folder": output, "dry_run": dry_run, "revision": revision, "private": private or None}
    to = handle.push_to_hub(repo, run=run, license=license, **where)
    show(_facts(handle) | {"folder" if dry_run else "pushed": to}, as_json, repo)


def _handle(model: str, adapter: str, strict: bool):
    from lofit_fast.patching.patched import handle_of

    return handle_of(loaded(model, adapter, "auto", "cpu", strict)[0])


def _facts(handle) -> dict[str, object]:
    """What an adapter is, in numbers."""
    return {
        "scaled heads": sum(len(layer.heads("scale")) for layer in handle.layers.values()),
        "shifted heads": sum(len(layer.heads("offset")) for layer in handle.layers.values()),
        "numbers": handle.n_parameters(),
    }
