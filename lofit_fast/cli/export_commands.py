"""The commands that write a model for other people's code: `merge`, and `export`, which also proves it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lofit_fast.cli.adapted_model import loaded
from lofit_fast.cli.command import show
from lofit_fast.cli.options import Adapter, Dtype, Json, Model, Strict, named_path

# heavy imports happen inside the commands: --help must be instant
Output = Annotated[
    Path,
    typer.Option("--output", "-o", parser=named_path, help="Folder to write, of the plain model say.", metavar="DIR"),
]
Target = Annotated[
    str,
    typer.Option(
        "--for", help="transformers (default), vllm, sglang, tgi, llama.cpp or peft: docs/guide.md.", metavar="NAME"
    ),
]
Template = Annotated[
    Path | None,
    typer.Option(
        parser=named_path,
        help="For llama.cpp: GGUF file of the base, whose metadata and tokenizer are copied. Default: the file that "
        "--model is loaded from.",
        metavar="FILE",
    ),
]
GgufType = Annotated[
    str | None,
    typer.Option(
        help="For llama.cpp: f32, f16 or bf16 for all matrices; as-is (default) copies those of the template.",
        metavar="TYPE",
    ),
]
PeftMethod = Annotated[
    str | None, typer.Option(help="For PEFT: beft (default), or lora for what knows LoRA alone.", metavar="NAME")
]


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
    from lofit_fast.patching.export_targets import export as write
    from lofit_fast.patching.verify import check_export

    handle, tokenizer = _patched(model, adapter, dtype, strict)
    write(handle, output, tokenizer)
    check_export(handle, output)
    show({"output": str(output)}, as_json, "merged")


def export(
    model: Model,
    adapter: Adapter,
    output: Output,
    target: Target = "transformers",
    template: Template = None,
    gguf_type: GgufType = None,
    peft_method: PeftMethod = None,
    dtype: Dtype = "float32",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write the adapter for transformers, a server or PEFT, read it back with their code, and compare.

    For transformers and servers of plain folders: merged, reloaded with stock transformers, logits compared with the
    patched model's. A server that would drop the offsets is refused. For llama.cpp: a GGUF file, whose tensors are
    compared. For PEFT: an adapter that stock PEFT loads, logits compared.
    """
    from lofit_fast.models.load import gguf_file
    from lofit_fast.patching.export_targets import TARGETS
    from lofit_fast.patching.export_targets import export as write
    from lofit_fast.patching.verify import verify_export, verify_peft

    if target not in TARGETS:
        raise ValueError(f"expected --for to be one of {', '.join(TARGETS)}, got {target!r}")
    given = {"template": template, "gguf_type": gguf_type, "peft_method": peft_method}
    if target == "llama.cpp" and template is None:
        given["template"] = gguf_file(model)
    handle, tokenizer = _patched(model, adapter, dtype, strict)
    write(handle, output, tokenizer, target=target, **given)
    if target == "llama.cpp":
        show({"output": str(output), "for": target}, as_json, "exported, tensors compared")
        return
    seen = asdict((verify_peft if target == "peft" else verify_export)(handle, output))
    effects = {f"without {component}s": effect for component, effect in seen.pop("effects").items()}
    show({"output": str(output), "for": target, **seen, **effects}, as_json, "exported and verified")


def _patched(model: str, adapter: str, dtype: str, strict: bool):
    """(handle, tokenizer) of a model with an adapter in it."""
    from lofit_fast.patching.patched import handle_of

    base, tokenizer = loaded(model, adapter, dtype, "cpu", strict)
    return handle_of(base), tokenizer
