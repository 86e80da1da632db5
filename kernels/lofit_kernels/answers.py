"""Answers measured on a device: which path was fastest for a shape. Kept in the user's cache folder, a file per device.

Nothing is read at import. A file made with another torch or Triton, or one that cannot be read, is ignored: the safe
default then stands. Nothing here is needed: a damaged file counts as none, with one warning, and is written anew.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as File
from types import MappingProxyType
from typing import NamedTuple

import torch

FORMAT_VERSION = 1
_HELD = "measured answers"
# the words of a path; `dispatch.py` says what they mean
BACKENDS = ("aten", "triton")
FORMS = ("fold", "pass", "delta", "dither")
# which of the two products is a Triton kernel with the scale inside: gemm -> (forward, backward); the others are the
# vendor's
GEMMS: Mapping[str, tuple[bool, bool]] = MappingProxyType(
    {
        "vendor": (False, False),
        "fused_forward": (True, False),
        "fused_backward": (False, True),
        "fused": (True, True),
    }
)
# a share of scaled heads is rounded up to the next of these
SHARES = (0.125, 0.25, 0.5, 1.0)


class Path(NamedTuple):
    """A way to compute a projection; see `dispatch.py` for the words."""

    form: str
    backend: str
    gemm: str

    def __str__(self) -> str:
        return "/".join(self)


class Key(NamedTuple):
    """What an answer depends on. dtype: its name without "torch."; share: of heads scaled; tokens: a power of four."""

    dtype: str
    N: int
    K: int
    D: int
    share: float
    tokens: int


def key(dtype: torch.dtype, N: int, K: int, D: int, n_scale: int, T: int) -> Key:
    """The key of a projection of T rows from K to N with `n_scale` scaled heads of D."""
    share = n_scale * D / K
    bucket = next(limit for limit in SHARES if share <= limit)
    return Key(str(dtype).removeprefix("torch."), N, K, D, bucket, tokens_bucket(T))


def tokens_bucket(T: int) -> int:
    """The largest power of four not above T; 1 for no tokens at all."""
    return 4 ** ((max(T, 1).bit_length() - 1) // 2)


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """What answers for a device are filed under: the GPU's own name, or torch's for the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str | None]:
    """The versions that answers hold for."""
    return {name: _version(name) for name in ("torch", "triton")}


def cache_folder() -> File:
    """Where lofit-fast keeps files of its own: $LOFIT_FAST_CACHE, or lofit-fast in the user's cache folder.

    Raises FileNotFoundError where neither is known: no variable is set, or to a "~", and the user has no home
    directory.
    """
    override = os.environ.get("LOFIT_FAST_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME")
    if caches and not override:
        return File(caches).absolute() / "lofit-fast"
    try:
        # a shell leaves a quoted "~" as it is
        return File(override).expanduser().absolute() if override else File.home() / ".cache" / "lofit-fast"
    except RuntimeError as error:
        raise FileNotFoundError(
            "there is no home directory to keep files in: set LOFIT_FAST_CACHE to a folder"
        ) from error


def kept_json(file: File, what: str) -> object:
    """The content of a JSON file that may be missing: None where it is, and with a warning where it cannot be read.

    what: what the file should hold.
    """
    try:
        # a pipe would be waited for
        if file.exists() and not file.is_file():
            raise OSError("it is no file")
        return json.loads(file.read_bytes())
    # a folder on the way is missing, or there is a file in its place
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        ignore(file, what, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        return None


def ignore(file: File, what: str, why: str) -> None:
    """Warn that a damaged file counts as none."""
    warnings.warn(f"ignoring {file}, which holds no {what}: {why}", stacklevel=3)


def answers_file(name: str) -> File:
    """The file of a device's answers."""
    return cache_folder() / "autotune" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"


def read_answers(name: str) -> Mapping[Key, Path]:
    """The answers in a device's file; none where there is no file, or one of another device, version or format."""
    return {case: Path(**row["path"]) for case, row in _read_rows(name).items()}


def answers_content(name: str, found: Mapping[Key, tuple[Path, Mapping[str, object]]]) -> dict:
    """What a device's file should hold: what it holds that is still valid, and what was found now.

    found: case -> path, and the evidence (timings) to be kept beside it.
    """
    rows = _read_rows(name)
    for case, (path, evidence) in found.items():
        rows[case] = {"case": case._asdict(), "path": path._asdict(), **evidence}
    return {**_valid_for(name), "answers": list(rows.values())}


def _valid_for(name: str) -> dict[str, object]:
    return {"format_version": FORMAT_VERSION, "device": name, "versions": versions()}


def _read_rows(name: str) -> dict[Key, dict]:
    try:
        file = answers_file(name)
    # nothing was kept where nothing can be
    except FileNotFoundError:
        return {}
    content = kept_json(file, _HELD)
    if content is None:
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("answers"), list):
        ignore(file, _HELD, "expected an object with a list of answers")
        return {}
    if any(content.get(field) != value for field, value in _valid_for(name).items()):
        return {}
    rows: dict[Key, dict] = {}
    for number, row in enumerate(content["answers"], start=1):
        if (wrong := _damage(row)) is not None:
            # of a file that was changed by something else nothing is to be trusted
            ignore(file, _HELD, f"answer {number} has {wrong}")
            return {}
        rows[Key(**row["case"])] = row
    return rows


def _damage(row: object) -> str | None:
    """What is wrong with an answer as it was read, or None."""
    for part, kind in (("case", Key), ("path", Path)):
        given = row.get(part) if isinstance(row, dict) else None
        if not isinstance(given, dict) or set(given) != set(kind._fields):
            return f"no {part} of {', '.join(kind._fields)}"
    case, path = row["case"], row["path"]
    if not all(isinstance(value, str) for value in (case["dtype"], *path.values())):
        return "names that are no text"
    sizes = [case[name] for name in ("N", "K", "D", "tokens")]
    if not all(type(size) is int and size > 0 for size in sizes) or case["share"] not in SHARES:
        return f"sizes that no projection has: {sizes}, share {case['share']}"
    if path["form"] not in FORMS or path["backend"] not in BACKENDS or path["gemm"] not in GEMMS:
        return f"a path that is not known: {'/'.join(path.values())}"
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
