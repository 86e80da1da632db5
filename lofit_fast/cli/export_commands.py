"""The commands that write a plain model: `merge`, and `export`, which also proves it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lofit_fast.cli.adapted_model import loaded
from lofit_fast.cli.command import show
from lofit_fast.cli.options import Adapter, Dtype, Json, Model, Strict

# heavy imports happen inside the commands: --help must be instant
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the plain model.")]


def merge(
    model: Model,
    adapter: Adapter,
    output: Output,
    dtype: Dtype = "float32",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write the adapter into the weights: a plain model folder, reloaded to compare its tensors.

    `export` also compares its logits.
    """
    from lofit_fast.patching.verify import check_export

    check_export(_exported(model, adapter, output, dtype, strict), output)
    show({"output": str(output)}, as_json, "merged")


def export(
    model: Model,
    adapter: Adapter,
    output: Output,
    dtype: Dtype = "float32",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Merge, write, reload with stock transformers, and compare its logits with the patched model's."""
    from lofit_fast.patching.verify import verify_export

    report = verify_export(_exported(model, adapter, output, dtype, strict), output)
    seen = asdict(report)
    effects = {f"without {component}s": effect for component, effect in seen.pop("effects").items()}
    show({"output": str(output), **seen, **effects}, as_json, "exported and verified")


def _exported(model: str, adapter: str, output: Path, dtype: str, strict: bool):
    """The handle whose plain model was written."""
    from lofit_fast.patching import export as plain
    from lofit_fast.patching.handle import handle_of

    base, tokenizer = loaded(model, adapter, dtype, "cpu", strict)
    handle = handle_of(base)
    plain.export(handle, output, tokenizer)
    return handle
