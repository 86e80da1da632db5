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
    """Tables by what they hold, the least recently used of more than `limit` dropped, those in a graph never."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.made = limit, 0
        self._kept: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._captured: dict[tuple, torch.Tensor] = {}
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
        on_gpu = device.type == "cuda"
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        with self._lock:
            found = self._captured.get(place)
            if found is None and (found := self._kept.get(place)) is not None:
                self._kept.move_to_end(place)
            if found is None:
                found = self._make(key if numbers is None else numbers(), columns, device, capturing)
                self._kept[place] = found
            if capturing:
                self._captured[place] = found
                self._kept.pop(place, None)
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        if on_gpu and not capturing:
            # should it be dropped while a kernel of this stream still waits to read it
            found.record_stream(torch.cuda.current_stream(device))
        return found

    def _make(self, numbers: Sequence[int], columns: int, device: torch.device, capturing: bool) -> torch.Tensor:
        if capturing:
            raise RuntimeError(
                "the addresses of the offsets' layers are not on the device yet, and nothing can be copied there while "
                "a CUDA graph is captured: run one step, forward and backward, before the capture, and move no tensor "
                "of the model in between"
            )
        self.made += 1
        return torch.tensor(numbers, dtype=torch.int64, device=device).view(-1, columns)


# of this process: equal numbers are equal tables, whoever asks
TABLES = AddressTables()
