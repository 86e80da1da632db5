"""From what a store should hold to one that is there, whole, and proved on the very model: of prefixes and of prompts.

A store that is there is proved and used. One that is missing, damaged, too small, or that the model disagrees with is
made anew, by one process: others that want the same wait for it, and then read. A fill that is killed leaves nothing
that anybody takes for a store.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lofit_fast.files import writable_folder
from lofit_fast.locks import alone
from lofit_fast.training.prefix_cache.store import RESERVE, Damaged, PrefixStore, lock_of, make_room, size_on_disk

# padded tokens per forward of a fill
FILL_TOKENS = 2048

Rows = Sequence[Sequence[int]]
T = TypeVar("T")


class Unfit(Exception):
    """Why nothing is kept."""


@dataclass(frozen=True)
class Wanted:
    """What a store should hold, and how it is made.

    what: what it is called in front of the user. root, key: the folder of stores, and the name of this one in it, by
    all that its states depend on. rows: distinct sequences of token ids, the shortest first. sample: the states of
    some, (.., N), as wide and in the dtype of all. gb: bound on all stores in the folder together, in 10^9 bytes.
    computing: the rows that will be kept -> what makes a batch of them into states (B, S, N). progress: whether a bar
    is shown.
    """

    what: str
    root: Path
    key: str
    rows: list[tuple[int, ...]]
    sample: Tensor
    gb: float
    computing: Callable[[Rows], Callable[[Rows], Tensor]]
    progress: bool

    def size(self, rows: Rows) -> int:
        """Bytes of the states of rows."""
        return sum(map(len, rows)) * self.sample.shape[-1] * self.sample.dtype.itemsize


def proven(wanted: Wanted, proved: Callable[[PrefixStore], T | str]) -> T:
    """What `proved` makes of the store that is wanted, which is filled first if need be.

    proved: what to use of a store; or, as a text, what the model says otherwise with it than without. Where rows do not
    all fit, the shortest are kept, and a warning says so.
    Raises Unfit where none fits or the model disagrees with what it has just filled itself, OSError where the disk does
    not take it.
    """
    folder = writable_folder(wanted.root) / wanted.key
    if folder.is_symlink():
        raise Unfit(f"{folder} is a link, expected a folder of its own")
    allowed = _allowed_bytes(wanted)
    kept = _that_fit(wanted, allowed)
    make_room(wanted.root, wanted.key, allowed - wanted.size(kept))

    def usable() -> T | None:
        store = PrefixStore.open(folder)
        if store is None or len(store) < len(kept) or store.states.nbytes > allowed:
            return None
        found = proved(store)
        # the key cannot see everything, such as what a hook does: what disagrees is made anew, and judged again
        return None if isinstance(found, str) else found

    # whoever fills it may be at it
    with suppress(Damaged):
        if (found := usable()) is not None:
            return found
    with alone(lock_of(folder), f"fill {folder}", wait=True):
        try:
            if (found := usable()) is not None:
                return found
        except Damaged as reason:
            warnings.warn(f"{wanted.what}: {reason}: made anew", stacklevel=6)
        PrefixStore.discard(folder)
        PrefixStore.write(folder, _filled(wanted, kept))
        return _judged(folder, proved)


def _judged(folder: Path, proved: Callable[[PrefixStore], T | str]) -> T:
    """What `proved` makes of the store that was just filled. Raises Unfit, and leaves no store then."""
    try:
        store = PrefixStore.open(folder)
        found = f"{folder} is gone" if store is None else proved(store)
        if isinstance(found, str):
            raise Unfit(found)
        return found
    except Damaged as reason:
        PrefixStore.discard(folder)
        raise Unfit(f"what was written cannot be read back: {reason}") from None
    except Exception:
        PrefixStore.discard(folder)
        raise


def _allowed_bytes(wanted: Wanted) -> int:
    """What the stores in a folder may take together: the bound, or what the disk has if that is less."""
    on_disk = shutil.disk_usage(wanted.root).free - RESERVE + size_on_disk(wanted.root)
    return max(0, int(min(wanted.gb * 1e9, on_disk)))


def _that_fit(wanted: Wanted, allowed: int) -> list[tuple[int, ...]]:
    """As many rows as are allowed, the shortest first. Warns when that is not all, raises Unfit when it is none."""
    rows = wanted.rows
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    count = int((ends <= allowed // wanted.size([(0,)])).sum())
    if count == len(rows):
        return rows
    given = "the bound is" if allowed + 1 > wanted.gb * 1e9 else "the disk has room for"
    short = f"they need {wanted.size(rows) / 1e9:.3g} GB, {given} {allowed / 1e9:.3g} GB"
    if not count:
        raise Unfit(short)
    message = f"{wanted.what}: {short}: {count} of {len(rows)} sequences are kept, batches with others run in full"
    warnings.warn(message, stacklevel=6)
    return rows[:count]


def _filled(wanted: Wanted, rows: Rows) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Every row with its states, computed in batches of like length."""
    compute = wanted.computing(rows)
    with tqdm(total=sum(map(len, rows)), desc=wanted.what, unit="tok", disable=not wanted.progress, leave=False) as bar:
        start = 0
        while start < len(rows):
            end = start + 1
            while end < len(rows) and (end + 1 - start) * len(rows[end]) <= FILL_TOKENS:
                end += 1
            for row, of_row in zip(rows[start:end], compute(rows[start:end]), strict=True):
                yield row, of_row[: len(row)]
                bar.update(len(row))
            start = end
