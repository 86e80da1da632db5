"""Small tables of numbers on a device: made once, found again step after step, and never taken from a CUDA graph.

A captured graph holds the address of a table and reads it at every replay, so a table that was used during a capture is
kept for good (a few kilobytes). Nothing may be copied to the device during a capture: a table must be there before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import torch

# of those that no graph holds: more than a process has adapted models at once
LIMIT = 256


class AddressTables:
    """Tables by what they hold. The least recently used of more than `limit` are dropped; those in a graph stay."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.made = limit, 0
        self._kept: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._captured: dict[int, torch.Tensor] = {}
        # autograd asks from a thread of its own
        self._lock = Lock()

    def table(
        self,
        key: tuple[int, ...],
        columns: int,
        device: torch.device,
        numbers: Callable[[], Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """An int64 tensor (rows, columns) on `device`, which holds `numbers()`, `key` itself where that is not given.

        key: ints that the numbers follow from. Raises RuntimeError where the table would have to be made while the
        current stream is captured.
        """
        place = (columns, device, key)
        with self._lock:
            found = self._kept.get(place)
            if found is None:
                found = self._kept[place] = self._make(key if numbers is None else numbers(), columns, device)
            else:
                self._kept.move_to_end(place)
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        return found

    def used(self, table: torch.Tensor) -> torch.Tensor:
        """The table itself, which a launch on the current stream is about to read."""
        if table.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                self._captured[id(table)] = table
            else:
                # should it be dropped while a kernel of this stream still waits to read it
                table.record_stream(torch.cuda.current_stream(table.device))
        return table

    def _make(self, numbers: Sequence[int], columns: int, device: torch.device) -> torch.Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the addresses of the offsets' layers are not on the device yet, and nothing can be copied there while "
                "a CUDA graph is captured: run one step, forward and backward, before the capture, and move no tensor "
                "of the model in between"
            )
        self.made += 1
        return torch.tensor(numbers, dtype=torch.int64, device=device).view(-1, columns)


# of this process: equal numbers are equal tables, whoever asks
TABLES = AddressTables()
