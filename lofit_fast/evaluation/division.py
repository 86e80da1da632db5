"""How the processes of a run divide an evaluation: by whole batches, each computed just as one process computes it.

Every process is given all of the work, computes its share, and gets everybody's results. All of them must call what
divides, in the same order; `ranks.apart` is for one that evaluates by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import nn
from tqdm.auto import tqdm

from lofit_fast import ranks
from lofit_fast.patching.sharding import gathers_weights
from lofit_fast.patching.tensor_parallel import n_holding

Unit = TypeVar("Unit")
Key = TypeVar("Key")
Value = TypeVar("Value")


class Division:
    """Who computes which of some forwards of a model.

    what: what is done, in words: "generating". Where every process has the whole model, they take forwards in turns.
    Under FSDP each forward gathers weights from all processes, so all must make the same number: a process with fewer
    repeats one, whose result is dropped. Where a model is cut in other ways (tensor parallel), every process computes
    everything.
    even: whether a unit is one forward, so that equal numbers of units are equal numbers of forwards.
    """

    def __init__(self, model: nn.Module, what: str, *, even: bool = True) -> None:
        self.what = what
        self.count, self.rank = ranks.count(), ranks.rank()
        cut = self.count > 1 and _is_cut(model)
        self.gathers = self.count > 1 and not cut and gathers_weights(model)
        # everything by everybody
        self.same = self.count == 1 or cut or (self.gathers and not even)
        # where some processes hold one model together and some another, the two may be asked different things
        self.asked_alike = self.count > 1 and (not cut or n_holding(model) == {self.count})

    @property
    def shares(self) -> bool:
        """Whether processes compute one forward together, in the midst of which none may go its own way."""
        return self.gathers or (self.count > 1 and self.same)

    def check_same(self, work: Sequence[object], named: str) -> None:
        """Raise ValueError in every process where they were given different work. named: the work, in words."""
        if self.asked_alike:
            digest = hashlib.sha256(repr(work).encode()).hexdigest()[:12]
            ranks.check_same(f"{len(work)} with the digest {digest}", named)

    def mine(self, units: Sequence[Unit]) -> list[tuple[Unit, bool]]:
        """This process's share, and of each unit whether its result counts."""
        if self.same:
            return [(unit, True) for unit in units]
        own = [(unit, True) for unit in units[self.rank :: self.count]]
        most = -(-len(units) // self.count)
        repeats = most - len(own) if self.gathers else 0
        return own + [(unit, False) for unit in units[:1] for _ in range(repeats)]

    def batches(self, batches: Sequence[Sequence[int]], progress: bool) -> Iterator[tuple[Sequence[int], bool]]:
        """The same, of batches of rows, with a bar of rows."""
        share = self.mine(batches)
        with self.bar(sum(len(rows) * counts for rows, counts in share), progress) as bar:
            for rows, counts in share:
                yield rows, counts
                bar.update(len(rows) * counts)

    def bar(self, total: int | None, progress: bool) -> tqdm:
        """A bar that the first process shows, of what it does itself."""
        return tqdm(total=total, desc=self.what, disable=not (progress and self.rank == 0), leave=False)

    def together(self) -> AbstractContextManager[None]:
        """A scope for the computing: an error in one process is raised in all, or ends all.

        Processes that compute a forward together may be in the midst of it when one of them fails. They would take a
        message about the error for weights, so they are ended.
        """
        if self.count == 1:
            return nullcontext()
        return ranks.joined(self.what) if self.same or self.gathers else ranks.together(self.what)

    def most(self, value: Key) -> Key:
        """The greatest of everybody's values, so that all go on with one, where they divide the work."""
        return value if self.same else max(ranks.gathered(value))

    def put_together(self, results: Mapping[Key, Value]) -> dict[Key, Value]:
        """Everybody's results."""
        if self.same:
            return dict(results)
        return {key: value for share in ranks.gathered(dict(results)) for key, value in share.items()}


def _is_cut(model: nn.Module) -> bool:
    """Whether processes compute parts of one forward together, so that they need the same inputs at the same time."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    fully = gathers_weights(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if (mesh := getattr(tensor, "device_mesh", None)) is not None and (not fully or mesh.ndim > 1):
            return True
        # DeepSpeed's mark: nobody knows when it gathers
        if hasattr(tensor, "ds_id"):
            return True
    return False
