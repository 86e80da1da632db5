"""GGUF files, converted once: a folder that stock `from_pretrained` loads, kept under the file's checksum."""

import json
from pathlib import Path

import torch

from lofit_fast.files import whole_folder, write_json
from lofit_fast.models.file_digest import digest_of
from lofit_kernels.answers import cache_folder

_CONVERSION = "conversion.json"


def converted(gguf: Path) -> Path:
    """The folder of the converted GGUF file, made on first use. Named after the file and its SHA-256."""
    checksum = digest_of(gguf)
    folder = cache_folder() / f"{gguf.stem}-{checksum[:12]}"
    if _is_whole(folder, checksum):
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
    # the weights are dequantized now: what says otherwise would refuse to save them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    with whole_folder(folder) as scratch:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(**where, trust_remote_code=False).save_pretrained(scratch)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    write_json(folder / _CONVERSION, {"source": gguf.name, "sha256": checksum, "sizes": sizes})
    return folder


def _is_whole(folder: Path, checksum: str) -> bool:
    """Whether a conversion of this very file is there, complete; its marker is written last."""
    try:
        marker = json.loads((folder / _CONVERSION).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in marker["sizes"].items())
        return whole and marker["sha256"] == checksum
    except (OSError, ValueError, KeyError, TypeError):
        return False
