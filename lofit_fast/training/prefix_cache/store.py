"""Hidden states on disk: one memory-mapped file of tokens and an index, in a folder of such stores with a bound.

Nothing of a store is believed. The index has a SHA-256 of every sequence's bytes and one of itself, all of which are
checked when a store is opened: that reads every byte once, as a pass over the data does, and hashes it, which takes one
thread a second for 1 to 2 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lofit_fast.files import whole_folder, write_json
from lofit_fast.locks import alone
from lofit_kernels.answers import cache_folder

_STATES, _INDEX = "states.bin", "index.json"
_NAME = re.compile(r"[0-9a-f]{32}")
# what a write that was killed leaves in the folder that it wrote to
_LEFT = ".lofit-*"
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# bytes of the disk that a fill leaves free
RESERVE = 10**9


class Damaged(Exception):
    """What of a store is not what was written."""


@dataclass(frozen=True)
class PrefixStore:
    """The states of some sequences, real tokens only, laid end to end.

    states: (tokens, N), mapped from disk. places: a sequence's digest -> (first row, number of rows).
    folder, mark: where the files are, and the digest of their index. A process that is given a store (a data loader's
    that was spawned) maps the same files instead of taking a copy; it gets a ValueError where they were replaced.
    """

    states: Tensor
    places: dict[bytes, tuple[int, int]]
    folder: Path | None = None
    mark: str = ""

    @classmethod
    def open(cls, folder: Path) -> PrefixStore | None:
        """The store in a folder, marked as used just now, every byte of it checked; None where no fill has ended.

        Raises Damaged for files that are not what was written.
        """
        if not (folder / _INDEX).is_file():
            return None
        index = _read_index(folder)
        store = _mapped(folder, index)
        _check_rows(store.states, folder, index)
        with suppress(OSError):
            os.utime(folder / _INDEX)
        return store

    @staticmethod
    def write(folder: Path, filled: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """Write a store in one pass, whole or not at all: the index comes last, and without it nothing is trusted.

        folder: without a store. filled: sequences of token ids with their states (len(ids), N), at least one.
        Raises OSError when it cannot be written, and leaves nothing of it then.
        """
        names, lengths, sums = [], [], []
        with whole_folder(folder) as scratch, (scratch / _STATES).open("wb") as file:
            for ids, states in filled:
                # bytes: numpy has no bfloat16
                raw = _bytes_of(states.cpu().contiguous())
                file.write(raw)
                names.append(digest(ids).hex())
                lengths.append(len(ids))
                sums.append(_sum(raw))
            # a page that a power cut loses would read as zeros in a file of the right size
            file.flush()
            os.fsync(file.fileno())
        dtype = str(states.dtype).removeprefix("torch.")
        index = {"width": states.shape[-1], "dtype": dtype, "lengths": lengths, "sequences": names, "sums": sums}
        write_json(folder / _INDEX, {**index, "mark": _mark(index)})

    @staticmethod
    def discard(folder: Path) -> None:
        """Remove the store in a folder, if there is one, and what fills that were killed have left of it.

        For the one that holds the store's lock. Whoever has the store mapped keeps what they see.
        """
        for name in (_INDEX, _STATES):
            (folder / name).unlink(missing_ok=True)
        for left in folder.glob(_LEFT):
            shutil.rmtree(left, ignore_errors=True)

    def __reduce__(self):
        """For another process; see above."""
        if self.folder is None:
            return PrefixStore, (self.states, self.places)
        return _mapped_again, (self.folder, self.mark)

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


def lock_of(folder: Path) -> Path:
    """The file of the lock that the one who fills a store holds. It lies beside the store, and stays."""
    return folder.with_name(f"{folder.name}.lock")


def make_room(root: Path, keep: str, allowed: int) -> None:
    """Delete stores, the longest unused first, until all but `keep` take up at most `allowed` bytes.

    root: the folder that holds stores, each named by 32 hex digits; anything else in it is left alone. What killed
    fills have left behind goes first: whatever is not whole and nobody holds the lock of. `keep` is left as it is.
    """
    stores = [path for path in root.glob("*") if _NAME.fullmatch(path.name) and path.is_dir() and path.name != keep]
    for store in stores:
        if not (store / _INDEX).is_file() or any(store.glob(_LEFT)):
            # somebody is filling it
            with suppress(BlockingIOError), alone(lock_of(store), f"clear {store}"):
                _clear(store)
    others = {path: size_on_disk(path) for path in stores if (path / _INDEX).is_file()}
    for path in sorted(others, key=_last_change):
        if sum(others.values()) <= allowed:
            break
        shutil.rmtree(path, ignore_errors=True)
        del others[path]


def _clear(store: Path) -> None:
    """Remove what is no part of a whole store; of none, the folder. For the one that holds its lock."""
    if not (store / _INDEX).is_file():
        shutil.rmtree(store, ignore_errors=True)
    for left in store.glob(_LEFT):
        shutil.rmtree(left, ignore_errors=True)


def _read_index(folder: Path) -> dict:
    """The index of a store, which is what was written. Raises Damaged."""
    path = folder / _INDEX
    try:
        index = json.loads(path.read_bytes())
        mark = index.pop("mark")
        right = mark == _mark(index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is not whole ({type(error).__name__})") from error
    if not right:
        raise Damaged(f"{path} is not what was written")
    return {**index, "mark": mark}


def _mapped(folder: Path, index: dict) -> PrefixStore:
    """The store of an index, its rows unchecked. Raises Damaged for a file of another size."""
    path, lengths, width, dtype = folder / _STATES, index["lengths"], index["width"], _DTYPES[index["dtype"]]
    shape = (sum(lengths), width)
    numbers = shape[0] * shape[1]
    try:
        size = path.stat().st_size
        if size != numbers * dtype.itemsize:
            raise Damaged(f"{path} has {size} bytes, expected {numbers * dtype.itemsize}")
        # private: nothing that happens to the tensor reaches the file
        states = torch.from_file(str(path), shared=False, size=numbers, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    names = (bytes.fromhex(name) for name in index["sequences"])
    return PrefixStore(states.view(shape), dict(zip(names, _places(lengths), strict=True)), folder, index["mark"])


def _mapped_again(folder: Path, mark: str) -> PrefixStore:
    """In another process: the store of a mark, whose rows were checked before it was handed on."""
    try:
        index = _read_index(folder)
        if index["mark"] != mark:
            raise Damaged(f"{folder} holds another store by now")
        return _mapped(folder, index)
    except Damaged as reason:
        raise ValueError(f"{folder} has changed since this process was begun: {reason}") from None


def _check_rows(states: Tensor, folder: Path, index: dict) -> None:
    """Raise Damaged unless the bytes of each sequence are those that were written."""

    def right(place: tuple[int, int], expected: str) -> bool:
        first, count = place
        return _sum(_bytes_of(states[first : first + count])) == expected

    # hashing leaves the interpreter's lock
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        found = list(pool.map(right, _places(index["lengths"]), index["sums"]))
    if not all(found):
        wrong = f"{found.count(False)} of {len(found)} sequences"
        raise Damaged(f"{folder / _STATES} is not what was written: {wrong} have other numbers")


def _bytes_of(states: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return states.flatten().view(torch.uint8).numpy().data


def _sum(raw: memoryview) -> str:
    """What a sequence's bytes are known by: half of their SHA-256, 32 hex digits."""
    return hashlib.sha256(raw).hexdigest()[:32]


def _mark(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


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
