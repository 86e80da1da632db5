"""Answers measured on a device: which path was fastest for a shape. Kept in the user's cache folder, a file per device.

Nothing is read at import. A file made with another torch or Triton, or one that cannot be read, is ignored: the safe
default then stands.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as File
from typing import NamedTuple

import torch

FORMAT_VERSION = 1
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
    """Where lofit-fast keeps files of its own: $LOFIT_FAST_CACHE, or lofit-fast in the user's cache folder."""
    if override := os.environ.get("LOFIT_FAST_CACHE"):
        return File(override)
    return File(os.environ.get("XDG_CACHE_HOME") or File.home() / ".cache") / "lofit-fast"


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
    file = answers_file(name)
    try:
        content = json.loads(file.read_text())
        if any(content[field] != value for field, value in _valid_for(name).items()):
            return {}
        rows = {Key(**row["case"]): row for row in content["answers"]}
        for row in rows.values():
            Path(**row["path"])
        return rows
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"ignoring {file}, which holds no measured answers: {error!r}", stacklevel=3)
        return {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
