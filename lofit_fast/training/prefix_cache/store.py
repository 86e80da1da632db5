"""Hidden states on disk: one memory-mapped file of tokens and an index, in a folder of such stores with a bound."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lofit_fast.files import whole_folder, write_json
from lofit_kernels.answers import cache_folder

_STATES, _INDEX = "states.bin", "index.json"
_NAME = re.compile(r"[0-9a-f]{32}")
# bytes of the disk that a fill leaves free
RESERVE = 10**9
# a fill writes all the time: what has not changed for this long was left by a process that is gone
_LEFT_AFTER_SECONDS = 3600


@dataclass(frozen=True)
class PrefixStore:
    """The states of some sequences, real tokens only, laid end to end.

    states: (tokens, N), mapped from disk. places: a sequence's digest -> (first row, number of rows).
    """

    states: Tensor
    places: dict[bytes, tuple[int, int]]

    @classmethod
    def open(cls, folder: Path) -> PrefixStore | None:
        """The store in a folder, marked as used just now; None unless it is there and whole, every number of it."""
        try:
            index = json.loads((folder / _INDEX).read_text())
            lengths, width, dtype = index["lengths"], index["width"], getattr(torch, index["dtype"])
            names = [bytes.fromhex(name) for name in index["sequences"]]
            shape = (sum(lengths), width)
            if (folder / _STATES).stat().st_size != shape[0] * shape[1] * dtype.itemsize:
                return None
            # private: nothing that happens to the tensor reaches the file
            states = torch.from_file(str(folder / _STATES), shared=False, size=shape[0] * shape[1], dtype=dtype)
            if _hex(_sum_of_bits(states)) != index["sum"]:
                return None
            places = dict(zip(names, _places(lengths), strict=True))
            os.utime(folder / _INDEX)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(states.view(shape), places)

    @staticmethod
    def write(folder: Path, filled: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """Write a store in one pass, whole or not at all: the index comes last, and without it nothing is trusted.

        folder: without a store. filled: sequences of token ids with their states (len(ids), N), at least one.
        Raises OSError when it cannot be written, and leaves nothing of it then.
        """
        names, lengths, total = [], [], 0
        with whole_folder(folder) as scratch, (scratch / _STATES).open("wb") as file:
            for ids, states in filled:
                # bytes: numpy has no bfloat16
                states = states.cpu().contiguous()
                file.write(states.view(torch.uint8).numpy().data)
                total += _sum_of_bits(states)
                names.append(digest(ids).hex())
                lengths.append(len(ids))
            # a page that a power cut loses would read as zeros in a file of the right size
            file.flush()
            os.fsync(file.fileno())
        dtype = str(states.dtype).removeprefix("torch.")
        index = {"width": states.shape[-1], "dtype": dtype, "lengths": lengths, "sequences": names}
        index["sum"] = _hex(total)
        write_json(folder / _INDEX, index)

    @staticmethod
    def discard(folder: Path) -> None:
        """Remove the store in a folder, if there is one. Whoever has it mapped keeps what they see."""
        for name in (_INDEX, _STATES):
            (folder / name).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.places)

    def find(self, ids: Sequence[int]) -> Tensor | None:
        """The states of a sequence, (len(ids), N), a view of the file; None if it is not here."""
        place = self.places.get(digest(ids))
        return None if place is None else self.states[place[0] : place[0] + place[1]]


def root_folder() -> Path:
    """Where stores are, unless told otherwise: "prefix" in the cache folder of lofit-fast."""
    return cache_folder() / "prefix"


def digest(ids: Sequence[int]) -> bytes:
    """What a sequence of token ids is found by: 16 bytes."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def size_on_disk(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none. Another process may be taking them away."""
    return sum(found.st_size for found in _stats(folder) if stat.S_ISREG(found.st_mode))


def make_room(root: Path, keep: str, allowed: int) -> None:
    """Delete stores, the longest unused first, until all but `keep` take up at most `allowed` bytes.

    root: the folder that holds stores, each named by 32 hex digits; anything else in it is left alone. What a killed
    fill has left behind goes first.
    """
    stores = [path for path in root.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()]
    for store in stores:
        for left in [*store.glob(".lofit-*"), *([] if (store / _INDEX).is_file() else [store])]:
            if time.time() - _last_change(left) > _LEFT_AFTER_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    others = {path: size_on_disk(path) for path in stores if path.name != keep and (path / _INDEX).is_file()}
    for path in sorted(others, key=_last_change):
        if sum(others.values()) <= allowed:
            break
        shutil.rmtree(path, ignore_errors=True)
        del others[path]


def _sum_of_bits(states: Tensor) -> int:
    """The numbers' bits, as whole numbers, added up in 64 bits: as fast as they are read, which training does anyway.

    What a disk loses or changes in the middle of a file no trial of a few sequences would find.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[states.dtype.itemsize]
    return int(states.view(whole).sum(dtype=torch.int64))


def _hex(total: int) -> str:
    """A sum as 64 bits hold it: 16 digits."""
    return f"{total % 2**64:016x}"


def _places(lengths: Sequence[int]) -> list[tuple[int, int]]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - length, length) for end, length in zip(ends, lengths, strict=True)]


def _last_change(path: Path) -> float:
    """When something below was last written or marked as used, in seconds since the epoch; 0 once it is gone."""
    return max((found.st_mtime for found in _stats(path)), default=0.0)


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Of a folder and everything below it, as far as it is still there."""
    for base, _, names in os.walk(folder):
        for path in (base, *(os.path.join(base, name) for name in names)):
            with suppress(FileNotFoundError):
                yield os.stat(path)
