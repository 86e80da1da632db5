"""The adapter on disk: adapter_config.json and adapter_model.safetensors, holding the selected heads only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lofit_fast.config import LofitConfig
from lofit_fast.files import whole_folder, write_json
from lofit_fast.patching.architectures import Fingerprint
from lofit_fast.patching.families import PROJECTIONS

# version 1 named tensors "layers.<n>.<projection>.<component>"; version 3 is of vectors that act on answers alone:
# releases that do not know of these must not apply them everywhere
FORMAT_VERSION, ANSWER_VERSION, READ_VERSIONS = 2, 3, (1, 2, 3)
# what PEFT and transformers show, a KeyError, when they meet such a folder and `lofit_fast.peft` is not imported: they
# look this up before anything else in the file
PEFT_TYPE = (
    "LOFIT: load this folder with lofit_fast.load(model, folder), or import lofit_fast.peft before PEFT reads it"
)
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
COMPONENTS = ("scale", "offset")


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is on disk: its config, its tensors by (component, layer), and the base model it is for.

    modules: the projections' names in the base model, by layer.
    """

    config: LofitConfig
    tensors: dict[tuple[str, int], Tensor]
    fingerprint: Fingerprint
    base_model: str
    modules: dict[int, str]


def save_adapter(adapter: Adapter, folder: Path | str) -> Path:
    """Write an adapter folder, whole or not at all. Returns the folder.

    Tensors are named as PEFT would name them, "base_model.model.<projection>.lofit_<component>": (heads in that layer,
    D) in their own dtype, float32 or float64, rows by ascending head.
    Raises OSError when the folder cannot be written.
    """
    config = adapter.config
    description = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "format_version": FORMAT_VERSION if config.positions == "all" else ANSWER_VERSION,
        "base_model_name_or_path": adapter.base_model,
        "fingerprint": adapter.fingerprint.as_dict(),
        "scale": config.scale,
        "offset": config.offset,
        "init_std": config.init_std,
        "seed": config.seed,
        "positions": config.positions,
    }
    tensors = {
        f"base_model.model.{adapter.modules[number]}.lofit_{component}": vectors.detach().cpu().contiguous()
        for (component, number), vectors in adapter.tensors.items()
    }
    with whole_folder(folder) as scratch:
        save_file(tensors, scratch / TENSOR_FILE, metadata={"format": "pt"})
        write_json(scratch / CONFIG_FILE, description)
    return Path(folder)


def read_adapter(folder: Path | str) -> Adapter:
    """Read an adapter folder.

    Raises FileNotFoundError when a file is missing, ValueError when one is truncated, of another kind, or of a newer
    format.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no adapter folder: {', '.join(missing)} not found")
    description = _read_description(folder / CONFIG_FILE)
    try:
        settings = {key: description[key] for key in ("scale", "offset", "init_std", "seed")}
        # folders of earlier releases know no other
        config = LofitConfig(**settings, positions=description.get("positions", "all"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not describe an adapter: {error}") from error
    made_for = description["fingerprint"]
    expected = {field.name for field in fields(Fingerprint)}
    if not isinstance(made_for, dict) or made_for.keys() != expected:
        raise ValueError(f"{folder / CONFIG_FILE} has the fingerprint {made_for}, expected {sorted(expected)}")
    base = description.get("base_model_name_or_path") or ""
    tensors, modules = _read_tensors(folder / TENSOR_FILE)
    return Adapter(config, tensors, Fingerprint(**made_for), base, modules)


def check_fits(adapter: Adapter, handle_fingerprint: Fingerprint) -> None:
    """Raise ValueError, naming both fingerprints, unless the adapter was made for a model of this shape."""
    if adapter.fingerprint != handle_fingerprint:
        raise ValueError(
            f"the adapter is for another model: it was made for {adapter.fingerprint}, this model is "
            f"{handle_fingerprint}"
        )


@torch.no_grad()
def fill(wanted: dict[tuple[str, int], Tensor], adapter: Adapter) -> None:
    """Copy the adapter's tensors into those of a model, all or none.

    wanted: the model's, by (component, layer).
    Raises ValueError, before anything is written, when a tensor is missing, unknown or of another shape.
    """
    shapes = {key: tuple(vectors.shape) for key, vectors in wanted.items()}
    got = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
    if shapes != got:
        wrong = sorted(key for key in shapes.keys() | got.keys() if shapes.get(key) != got.get(key))
        first = wrong[0]
        raise ValueError(
            f"adapter tensors do not match adapter_config.json in {len(wrong)} places: {first[0]} of layer {first[1]} "
            f"is {got.get(first)}, expected {shapes.get(first)}"
        )
    for key, vectors in wanted.items():
        vectors.copy_(adapter.tensors[key])


def _read_description(path: Path) -> dict:
    try:
        description = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(description, dict) or str(description.get("peft_type")).split(":")[0] != "LOFIT":
        kind = description.get("peft_type") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{path} is not a LoFiT adapter: expected peft_type 'LOFIT', got {kind!r}")
    expected = {"format_version", "fingerprint", "scale", "offset", "init_std", "seed"}
    if description.get("format_version") == ANSWER_VERSION:
        # else its vectors would act everywhere
        expected.add("positions")
    if absent := sorted(expected - description.keys()):
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    if description["format_version"] not in READ_VERSIONS:
        raise ValueError(
            f"{path} has format version {description['format_version']}, this release reads up to {max(READ_VERSIONS)}"
        )
    return description


def parse_tensor_name(name: str) -> tuple[str, int] | None:
    """(component, layer) of a tensor's name; None for a foreign one."""
    match = _parsed(name)
    return None if match is None else (match["component"], int(match["layer"]))


def _parsed(name: str) -> re.Match | None:
    return next(filter(None, (pattern.fullmatch(name) for pattern in _TENSOR_NAMES)), None)


def _tensor_names(projection: str) -> re.Pattern:
    return re.compile(rf"(?P<module>(?:.+\.)?(?P<layer>\d+)\.(?:{projection}))\.(?:lofit_)?(?P<component>scale|offset)")


# the layer is the last number, and what follows it is the projection; some projections have a number in their own path
_NUMBERED = "|".join(re.escape(path) for path in PROJECTIONS if re.search(r"\.\d+\.", path))
_TENSOR_NAMES = (_tensor_names(_NUMBERED), _tensor_names(r"[^.\d][^.]*(?:\.[^.\d][^.]*)*"))


def _read_tensors(path: Path) -> tuple[dict[tuple[str, int], Tensor], dict[int, str]]:
    """(tensors, modules) of an `Adapter`."""
    try:
        with safe_open(path, framework="pt") as file:
            named = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    tensors, modules = {}, {}
    for name, tensor in named.items():
        if (key := parse_tensor_name(name)) is None:
            raise ValueError(
                f"{path} holds a foreign tensor {name!r}: expected base_model.model.<projection>.lofit_<component>"
            )
        tensors[key] = tensor
        modules[key[1]] = _parsed(name)["module"].removeprefix("base_model.model.")
    return tensors, modules
