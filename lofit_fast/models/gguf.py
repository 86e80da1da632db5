"""GGUF files, converted once: a folder that stock `from_pretrained` loads, kept under the file's checksum."""

import shutil
from pathlib import Path

import torch

from lofit_fast.checksums import sums_of
from lofit_fast.files import read_json, whole_folder, writable_folder, write_json
from lofit_fast.locks import alone
from lofit_fast.models.file_digest import digest_of
from lofit_fast.models.written_weights import write_model
from lofit_kernels.answers import cache_folder

_CONVERSION = "conversion.json"


def converted(gguf: Path) -> Path:
    """The folder of the converted GGUF file, made on first use. Named after the file and its SHA-256.

    A folder of which a byte has changed is made anew. One process converts at a time, and the others wait for it.
    Raises OSError where the cache folder cannot be written.
    """
    checksum = digest_of(gguf)
    folder = cache_folder() / f"{gguf.stem}-{checksum[:12]}"
    if _is_whole(folder, checksum):
        return folder
    locks = writable_folder(cache_folder() / "locks")
    with alone(locks / f"{folder.name}.lock", f"convert {gguf}", wait=True):
        if not _is_whole(folder, checksum):
            _convert(gguf, folder, checksum)
    return folder


def _convert(gguf: Path, folder: Path, checksum: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
    # the weights are dequantized now: what says otherwise would refuse to save them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    # of an earlier conversion, which is not whole
    shutil.rmtree(folder, ignore_errors=True)
    with whole_folder(folder, last=_CONVERSION) as scratch:
        write_model(model, scratch)
        AutoTokenizer.from_pretrained(**where, trust_remote_code=False).save_pretrained(scratch)
        sizes = {path.name: path.stat().st_size for path in scratch.glob("*.safetensors")}
        sums = sums_of(scratch, _CONVERSION)
        write_json(scratch / _CONVERSION, {"source": gguf.name, "sha256": checksum, "sizes": sizes, "files": sums})


def _is_whole(folder: Path, checksum: str) -> bool:
    """Whether a conversion of this very file is there, complete and unchanged; its marker is written last.

    Earlier releases kept sizes alone, by which a changed byte is not noticed.
    """
    try:
        marker = read_json(folder / _CONVERSION)
        return marker["sha256"] == checksum and marker["files"] == sums_of(folder, _CONVERSION, digest_of)
    except (OSError, ValueError, KeyError, TypeError):
        return False
