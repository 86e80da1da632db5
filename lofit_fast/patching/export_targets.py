"""`export`: one call for all that a trained adapter can be handed to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lofit_fast.patching import export as plain
from lofit_fast.patching.gguf_export import export_gguf
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.server_support import SERVERS
from lofit_fast.patching.stock_peft import export_peft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS = ("transformers", *SERVERS, "peft")
# the targets that are not the plain folder of transformers, and the options that are theirs alone
_OPTIONS: dict[str, tuple[str, ...]] = {
    "llama.cpp": ("template", "gguf_type"),
    "peft": ("peft_method",),
}


def export(
    handle: LofitHandle,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    target: str = "transformers",
    template: Path | str | None = None,
    gguf_type: str | None = None,
    peft_method: str | None = None,
) -> Path:
    """Write the adapter for other people's code to use, in a folder; the handle lives on.

    target: "transformers" for the merged model as a plain folder, see `patching.export.export`; "vllm", "sglang" or
    "tgi" for the same, refused where the server's code would drop the offsets (`patching.server_support.SERVERS`);
    "llama.cpp" for the merged model as a GGUF file, see `patching.gguf_export.export_gguf`, which template and
    gguf_type are for; "peft" for an adapter that stock PEFT loads, see `patching.stock_peft.export_peft`, which
    peft_method is for. tokenizer: saved in plain folders when given.
    Returns the folder. Raises ValueError for an unknown target, an option of another one, and as each of these does.
    """
    if target not in TARGETS:
        raise ValueError(f"expected target to be one of {', '.join(TARGETS)}, got {target!r}")
    options = {"template": template, "gguf_type": gguf_type, "peft_method": peft_method}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - set(_OPTIONS.get(target, ())):
        owner = next(other for other, names in _OPTIONS.items() if name in names)
        raise ValueError(f"{name} is for target={owner!r}, got target={target!r}")
    if target == "llama.cpp":
        return export_gguf(handle, folder, **given)
    if target == "peft":
        return export_peft(handle, folder, **given)
    return plain.export(handle, folder, tokenizer, server=target if target in SERVERS else None)
