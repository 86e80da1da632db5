"""GGUF files, converted once: a folder that stock `from_pretrained` loads, kept under the file's checksum."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lofit_fast.checksums import sums_of
from lofit_fast.files import read_json, whole_folder, writable_folder, write_json
from lofit_fast.locks import alone
from lofit_fast.models.file_digest import digest_of
from lofit_fast.models.gguf_contents import contents_of
from lofit_fast.models.written_weights import write_model
from lofit_kernels.answers import cache_folder

_CONVERSION = "conversion.json"
# of a conversion that holds all of its file's tensors: earlier releases' lack biases that transformers passes over
_FORMAT = 2


def converted(gguf: Path) -> Path:
    """The folder of the converted GGUF file, made on first use. Named after the file and its SHA-256.

    A folder of which a byte has changed is made anew. One process converts at a time, and the others wait for it.
    Raises OSError where the cache folder cannot be written, and ValueError, naming the tensors, for a file of which
    transformers would load a part only (see `gguf_contents`).
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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    contents, config = contents_of(gguf), AutoConfig.from_pretrained(**where, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{gguf} holds a {config.model_type}, expected a language model that transformers knows")
    config = contents.completed(config, AutoModelForCausalLM._model_mapping[type(config)])
    with _quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    contents.check_loaded(model, set(info["missing_keys"]), set(info["unexpected_keys"]))
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
        note = {"format": _FORMAT, "source": gguf.name, "sha256": checksum, "sizes": sizes, "files": sums}
        write_json(scratch / _CONVERSION, note)


@contextmanager
def _quiet() -> Iterator[None]:
    """A scope without transformers' report of biases that are not in the file, and are set to zero here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _is_whole(folder: Path, checksum: str) -> bool:
    """Whether a conversion of this very file is there, complete and unchanged; its marker is written last.

    Earlier releases kept sizes alone, by which a changed byte is not noticed.
    """
    try:
        marker = read_json(folder / _CONVERSION)
        told = (marker["format"], marker["sha256"])
        return told == (_FORMAT, checksum) and marker["files"] == sums_of(folder, _CONVERSION, digest_of)
    except (OSError, ValueError, KeyError, TypeError):
        return False
