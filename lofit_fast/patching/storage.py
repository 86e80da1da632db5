"""The adapter on disk: adapter_config.json and adapter_model.safetensors, holding the selected heads only.

The file of tensors says in its header what the config says. So one rename decides: an adapter that is saved over
another replaces it when its tensors are in place, and a process that is killed before its config is leaves it whole.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from lofit_fast.config import LofitConfig, shown
from lofit_fast.files import given_path, read_json, whole_folder, write_json
from lofit_fast.patching.adapter_places import check_place
from lofit_fast.patching.architectures import Fingerprint
from lofit_fast.patching.families import PROJECTIONS
from lofit_fast.patching.fully_sharded import put
from lofit_fast.patching.placement import COMPUTED_IN
from lofit_fast.patching.seal import TENSOR_DIGEST, is_sealed, is_unchanged, sealed, tensors_digest

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
# the entry of the tensor file's header that repeats the config
_NOTE = "lofit"
_LONGEST_NAME, _MOST_BYTES = 500, 2**31


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is on disk: its config, its tensors by (component, layer), and the base model it is for.

    modules: the projections' names in the base model, by layer. base_digest: of the base's weights, see
    `weight_sample.base_digest`; "" in folders of earlier releases.
    """

    config: LofitConfig
    tensors: dict[tuple[str, int], Tensor]
    fingerprint: Fingerprint
    base_model: str
    modules: dict[int, str]
    base_digest: str = ""


def save_adapter(adapter: Adapter, folder: Path | str) -> Path:
    """Write an adapter folder, whole or not at all. Returns the folder.

    Tensors are named as PEFT would name them, "base_model.model.<projection>.lofit_<component>": (heads in that layer,
    D) in their own dtype, float32 or float64, rows by ascending head. Digests of the tensors and of the config are in
    the config, and `read_adapter` checks them.
    Raises ValueError for vectors that are not finite, or a folder with a model or an adapter of another kind in it;
    OSError when the folder cannot be written. It is as it was then.
    """
    check_finite(adapter.tensors, "cannot save the adapter")
    check_place(given_path(folder), CONFIG_FILE, "LOFIT")
    config, tensors = adapter.config, {key: t.detach().cpu().contiguous() for key, t in adapter.tensors.items()}
    description = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "format_version": FORMAT_VERSION if config.positions == "all" else ANSWER_VERSION,
        "base_model_name_or_path": adapter.base_model,
        "base_digest": adapter.base_digest,
        "fingerprint": adapter.fingerprint.as_dict(),
        "scale": config.scale,
        "offset": config.offset,
        "init_std": config.init_std,
        "seed": config.seed,
        "positions": config.positions,
    }
    description = sealed(description, tensors_digest(tensors))
    named = {
        f"base_model.model.{adapter.modules[number]}.lofit_{component}": vectors
        for (component, number), vectors in tensors.items()
    }
    with whole_folder(folder, last=CONFIG_FILE) as scratch:
        (scratch / TENSOR_FILE).write_bytes(_with_note(save(named), description))
        write_json(scratch / CONFIG_FILE, description)
    return Path(folder)


def read_adapter(folder: Path | str) -> Adapter:
    """Read an adapter folder.

    Raises FileNotFoundError when a file is missing, ValueError when one is truncated, damaged, of another kind, or of a
    newer format. Folders of earlier releases have no digests: their numbers must be finite, and no more can be told.
    """
    folder = given_path(folder)
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no adapter folder: {', '.join(missing)} not found")
    description = _checked_description(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE))
    named, note = _opened(folder / TENSOR_FILE)
    tensors, modules = _by_place(folder / TENSOR_FILE, named)
    description = _described(folder, description, note, tensors)
    adapter = _made(folder, description, tensors, modules)
    _check_described(folder, adapter)
    if is_sealed(description):
        _check_seal(folder, description, tensors)
    check_finite(tensors, str(folder / TENSOR_FILE))
    return adapter


def description_in(folder: Path) -> dict:
    """What `read_adapter` would take for the folder's description; the tensors may come later, as they do from a hub.

    Raises ValueError for a config that is none of an adapter, or damaged, or a file of tensors that cannot be read.
    """
    description = _checked_description(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE))
    path = folder / TENSOR_FILE
    if path.is_file():
        # which maps the file and reads the header alone
        with _damage_named(path), safe_open(path, framework="pt") as file:
            note = _note_in(file.metadata())
        # PEFT writes no note, and tensors of other modules beside ours, which may be large
        if is_sealed(note):
            named, note = _opened(path)
            description = _described(folder, description, note, _by_place(path, named)[0])
    # a config of PEFT that has met no model has no fingerprint
    if description["fingerprint"] is not None:
        _made(folder, description, {}, {})
    if is_sealed(description):
        _check_entries(folder, description)
    return description


def _described(folder: Path, description: dict, note: object, tensors: dict) -> dict:
    """The config's description; that of the tensors' own header where the config is of an adapter that was here before.

    So it is when the process that saved the adapter was killed between its two files.
    """
    if not is_sealed(note) or description.get(TENSOR_DIGEST) == note.get(TENSOR_DIGEST):
        return description
    whole = is_unchanged(note) and note[TENSOR_DIGEST] == tensors_digest(tensors)
    # a config that was changed by hand is none of an earlier adapter
    earlier = not is_sealed(description) or is_unchanged(description)
    return _checked_description(folder / TENSOR_FILE, note) if whole and earlier else description


def _made(folder: Path, description: dict, tensors: dict, modules: dict) -> Adapter:
    """The adapter of a description. Raises ValueError for values of the wrong kind."""
    path = folder / CONFIG_FILE
    try:
        settings = {key: description[key] for key in ("scale", "offset", "init_std", "seed")}
        # folders of earlier releases know no other
        config = LofitConfig(**settings, positions=description.get("positions", "all"))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} does not describe an adapter: {error}") from error
    made_for = description["fingerprint"]
    expected = {field.name for field in fields(Fingerprint)}
    if not isinstance(made_for, dict) or made_for.keys() != expected or not _is_shape(made_for):
        raise ValueError(f"{path} has the fingerprint {shown(made_for)}, expected {sorted(expected)}")
    names = [description.get(key) or "" for key in ("base_model_name_or_path", "base_digest")]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} names its base model by {shown(names)}, expected text")
    base, digest = names
    return Adapter(config, tensors, Fingerprint(**made_for), base, modules, digest)


def _is_shape(made_for: dict) -> bool:
    """Whether the values of a fingerprint are of their kinds."""

    def whole(value: object) -> bool:
        return type(value) is int and value > 0

    sizes = [made_for[name] for name in ("heads", "head_dim", "hidden")]
    listed = all(size and all(map(whole, size)) if isinstance(size, list) else whole(size) for size in sizes)
    return isinstance(made_for["model_type"], str) and whole(made_for["layers"]) and listed


def _check_described(folder: Path, adapter: Adapter) -> None:
    """Raise ValueError unless the heads are those of the model's shape, and the tensors have a row for each of them."""
    widths = _numbers(adapter.fingerprint.head_dim)
    most = max(_numbers(adapter.fingerprint.heads))
    expected: dict[tuple[str, int], tuple[int, ...]] = {}
    for component in COMPONENTS:
        heads = getattr(adapter.config, component)
        if heads == "all":
            # which layers have a projection is for the model to say
            expected |= {key: tuple(t.shape) for key, t in adapter.tensors.items() if key[0] == component}
            continue
        if beyond := [head for head in heads or () if head[1] >= most]:
            raise ValueError(
                f"{folder / CONFIG_FILE} names heads that its model does not have: {shown(beyond)}; expected heads "
                f"below {most}"
            )
        rows = Counter(layer for layer, _ in heads or ())
        expected |= {(component, layer): (count, widths[0]) for layer, count in rows.items()}
    got = {key: tuple(t.shape) for key, t in adapter.tensors.items()}
    # of layers with different widths the model knows which has which
    if len(set(widths)) > 1:
        expected = {key: (count, (got.get(key) or (0,))[-1]) for key, (count, *_) in expected.items()}
    _check_shapes(f"{folder}: ", expected, got)


def _numbers(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else size


def _check_shapes(where: str, expected: dict[tuple[str, int], tuple], got: dict[tuple[str, int], tuple]) -> None:
    """Raise ValueError unless tensors, by (component, layer), are there and have their shapes."""
    if expected == got:
        return
    wrong = sorted(key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key))
    first = wrong[0]
    raise ValueError(
        f"{where}adapter tensors do not match {CONFIG_FILE} in {len(wrong)} places: {first[0]} of layer {first[1]} "
        f"is {got.get(first)}, expected {expected.get(first)}"
    )


def _check_seal(folder: Path, description: dict, tensors: dict) -> None:
    """Raise ValueError, naming the file, unless both files are as they were saved."""
    _check_entries(folder, description)
    if description.get(TENSOR_DIGEST) != tensors_digest(tensors):
        raise ValueError(
            f"{folder / TENSOR_FILE} is damaged: its tensors are not those whose digest is in {CONFIG_FILE}"
        )


def _check_entries(folder: Path, description: dict) -> None:
    if not is_unchanged(description):
        raise ValueError(
            f"{folder / CONFIG_FILE} is damaged, or was changed by hand: its entries are not those whose digest it has"
        )


def check_finite(tensors: dict[tuple[str, int], Tensor], where: str) -> None:
    """Raise ValueError, beginning with `where`, for tensors by (component, layer) with numbers that are not finite."""
    for (component, layer), tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {component} of layer {layer} has numbers that are not finite")


def check_fits(adapter: Adapter, handle_fingerprint: Fingerprint) -> None:
    """Raise ValueError, naming both fingerprints, unless the adapter was made for a model of this shape."""
    if adapter.fingerprint != handle_fingerprint:
        raise ValueError(
            f"the adapter is for another model: it was made for {adapter.fingerprint}, this model is "
            f"{handle_fingerprint}"
        )


def check_heads(adapter: Adapter, config: LofitConfig) -> None:
    """Raise ValueError for an adapter of other heads than a config has: its tensors may fit all the same."""
    for component in COMPONENTS:
        theirs, ours = getattr(adapter.config, component), getattr(config, component)
        # "all" may be said in a list too: the shapes of the tensors tell these apart
        if "all" not in (theirs, ours) and set(theirs or ()) != set(ours or ()):
            raise ValueError(
                f"cannot load {component}s of other heads than the handle has: got {shown(theirs)}, expected "
                f"{shown(ours)}; lofit_fast.load patches as the folder says"
            )


@torch.no_grad()
def fill(wanted: dict[tuple[str, int], Tensor], adapter: Adapter) -> None:
    """Copy the adapter's tensors into those of a model, all or none.

    wanted: the model's, by (component, layer).
    Raises ValueError, before anything is written, when a tensor is missing, unknown, of another shape, or not finite in
    the model's dtype.
    """
    shapes = {key: tuple(vectors.shape) for key, vectors in wanted.items()}
    _check_shapes("", shapes, {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()})
    rounded = {key: adapter.tensors[key].to(vectors.dtype) for key, vectors in wanted.items()}
    check_finite(rounded, "the adapter cannot be loaded")
    for key, vectors in wanted.items():
        put(rounded[key], vectors)


def _checked_description(path: Path, description: object) -> dict:
    """The description, if it is one of an adapter, in a format that is read here."""
    if not isinstance(description, dict) or str(description.get("peft_type")).split(":")[0] != "LOFIT":
        kind = description.get("peft_type") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{path} is not a LoFiT adapter: expected peft_type 'LOFIT', got {shown(kind)}")
    expected = {"format_version", "fingerprint", "scale", "offset", "init_std", "seed"}
    if description.get("format_version") == ANSWER_VERSION:
        # else its vectors would act everywhere
        expected.add("positions")
    if absent := sorted(expected - description.keys()):
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    version = description["format_version"]
    if type(version) is not int or version not in READ_VERSIONS:
        raise ValueError(f"{path} has format version {shown(version)}, this release reads up to {max(READ_VERSIONS)}")
    return description


def parse_tensor_name(name: str) -> tuple[str, int] | None:
    """(component, layer) of a tensor's name; None for a foreign one."""
    match = _parsed(name)
    return None if match is None else (match["component"], int(match["layer"]))


def _parsed(name: str) -> re.Match | None:
    # no projection's name is so long, and matching takes longer than that
    if len(name) > _LONGEST_NAME:
        return None
    return next(filter(None, (pattern.fullmatch(name) for pattern in _TENSOR_NAMES)), None)


def _tensor_names(projection: str) -> re.Pattern:
    layer = r"(?P<layer>0|[1-9][0-9]{0,8})"
    module = rf"(?P<module>(?:.+\.)?{layer}\.(?P<projection>{projection}))"
    return re.compile(rf"{module}\.(?:lofit_)?(?P<component>scale|offset)")


# the layer is the last number, and what follows it is the projection; some projections have a number in their own path
_NUMBERED = "|".join(re.escape(path) for path in PROJECTIONS if re.search(r"\.\d+\.", path))
_TENSOR_NAMES = (_tensor_names(_NUMBERED), _tensor_names(r"[^.\d][^.]*(?:\.[^.\d][^.]*)*"))


def _by_place(path: Path, named: dict[str, Tensor]) -> tuple[dict[tuple[str, int], Tensor], dict[int, str]]:
    """(tensors, modules) of an `Adapter`. Raises ValueError for a name or a kind of numbers that is none of ours."""
    tensors: dict[tuple[str, int], Tensor] = {}
    modules: dict[int, str] = {}
    for name, tensor in named.items():
        if (key := parse_tensor_name(name)) is None:
            raise ValueError(
                f"{path} holds a foreign tensor {shown(name)}: expected base_model.model.<projection>.lofit_<component>"
            )
        if key in tensors:
            raise ValueError(f"{path} holds {key[0]} of layer {key[1]} twice, under two names")
        if tensor.dtype not in COMPUTED_IN:
            raise ValueError(f"{path} holds {key[0]} of layer {key[1]} in {tensor.dtype}: expected floating numbers")
        match = _parsed(name)
        module = modules.setdefault(key[1], match["module"].removeprefix("base_model.model."))
        if not f".{module}".endswith(f".{key[1]}.{match['projection']}"):
            raise ValueError(f"{path} has two projections of layer {key[1]}: {module} and {match['module']}")
        tensors[key] = tensor
    return tensors, modules


def _opened(path: Path) -> tuple[dict[str, Tensor], object]:
    """(tensors by name, note in the header), of one moment. Raises ValueError for what is no file of safetensors.

    The file is opened once: `safe_open` opens it again for the numbers, when it may have been replaced.
    """
    with path.open("rb") as file:
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes: expected the vectors of an adapter")
    with _damage_named(path):
        named = load(raw)
        note = _note_in(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__"))
    return named, note


def _note_in(metadata: dict[str, str] | None) -> object:
    """The description in a file's header; None in files of earlier releases and of PEFT."""
    note = (metadata or {}).get(_NOTE)
    return None if note is None else json.loads(note)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """A scope in which what is wrong with a file of safetensors is a ValueError that names it."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    # safetensors' own error, and others for kinds of numbers that torch does not know
    except Exception as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _with_note(file: bytes, description: dict) -> bytes:
    """A safetensors file with the description in its header.

    safetensors writes entries beside each other in a random order, and one adapter must give one file.
    """
    size = int.from_bytes(file[:8], "little")
    tensors = json.loads(file[8 : 8 + size])
    header = {"__metadata__": {"format": "pt", _NOTE: json.dumps(description)}, **tensors}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + file[8 + size :]
