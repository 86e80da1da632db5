"""Which examples share a batch: of like length, so that little is padding."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from tqdm.auto import tqdm

# lengths are blurred by up to this share, so that an epoch's batches are not the last epoch's
_BLUR = 0.05


class GroupedByLength(Sampler[int]):
    """Indices such that each run of batch_size of them has examples of like length.

    The batches come in random order, but for the one with the longest example, which comes first: what does not fit
    the memory fails at once, and the memory that the longest batch needed is enough for the others.
    lengths: tokens per example. batch_size: examples per optimizer step; within one, micro-batches are sorted too.
    Sorts the whole epoch, not parts of it; the rest that fills no batch comes last and has any length. Every example
    once per epoch, as many batches as without grouping, the same order for the same (seed, epoch) in any process.
    Raises ValueError for a batch size below 1.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        check_count("batch_size", batch_size)
        self.lengths = torch.tensor(lengths, dtype=torch.float64)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Whose order the next iteration gives: trainers call it, also when they resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        blur = 1 + _BLUR * (2 * torch.rand(len(self), generator=draw, dtype=torch.float64) - 1)
        by_length = (self.lengths * blur).argsort(stable=True)
        rest = len(self) % self.batch_size
        start = int(torch.randint(len(self) - rest + 1, (), generator=draw))
        left = by_length[start : start + rest]
        batches = torch.cat((by_length[:start], by_length[start + rest :])).view(-1, self.batch_size)
        order = torch.randperm(len(batches), generator=draw)
        if len(batches):
            longest = self.lengths[batches].amax(1).argmax()
            order = torch.cat((longest[None], order[order != longest]))
        return iter([*batches[order].flatten().tolist(), *left.tolist()])


def longest_first(lengths: Sequence[int], batch_size: int, label: str, progress: bool) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first, so that memory peaks at once. For passes without training.

    Args:
        lengths: tokens per row.
        batch_size: rows per batch; the last may have fewer.
        label, progress: of the bar that counts rows, and whether it is shown.

    Raises:
        ValueError: a batch_size that is no whole number from 1, with which no row would be seen.
    """
    check_count("batch_size", batch_size)
    return _longest_first(lengths, batch_size, label, progress)


def _longest_first(lengths: Sequence[int], batch_size: int, label: str, progress: bool) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with tqdm(total=len(order), desc=label, disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            yield batch
            bar.update(len(batch))


def check_count(name: str, count: object) -> None:
    """Raise ValueError for what is no whole number from 1. name: what the caller calls it."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: got {count!r}, expected a whole number from 1")
