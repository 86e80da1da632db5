"""What is trained on: the examples every peer sees, and the batches each setting makes of them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lofit_fast.data.encode import Encoded, encode, pad_token_id
from lofit_fast.tasks import Task, load_task
from lofit_fast.training import CompletionCollator

Collate = Callable[[Sequence[Encoded]], dict[str, Tensor]]

BATCH = 8
# of whole runs, and what steps are timed on: about the paper's 300, since the fewer the more padding sorting leaves
EXAMPLES, POOL = 64, 256


@dataclass(frozen=True)
class Workload:
    """Encoded training examples. source: what they are, in words; pad: the token that fills up a batch."""

    rows: list[Encoded]
    pad: int
    source: str

    def drawn(self, number: int, size: int) -> list[Encoded]:
        """The examples of round `number`: another `size` of them each round, in no order, the same for everybody.

        They are those of some of the batches that an epoch over all rows has when it is grouped by length, so that
        sorting them again gives these batches: a round is a part of an epoch, not a small epoch with more padding.
        """
        draw = random.Random(number)
        by_length = _by_length(self.rows)
        batches = [by_length[i : i + BATCH] for i in range(0, len(by_length), BATCH)]
        rows = [row for batch in draw.sample(batches, min(-(-size // BATCH), len(batches))) for row in batch]
        return draw.sample(rows, min(size, len(rows)))

    def describe(self) -> dict:
        """The source, the number of examples, and their mean tokens and labelled tokens."""
        lengths = [len(row["input_ids"]) for row in self.rows]
        labels = [sum(label >= 0 for label in row["labels"]) for row in self.rows]
        counts = {"mean_tokens": sum(lengths) / len(lengths), "mean_labels": sum(labels) / len(labels)}
        return {"source": self.source, "examples": len(self.rows), **counts}


def task(data: str | Path | None, size: int = EXAMPLES) -> Task:
    """CLUTRR from the folder `data`, or without one the built-in family stories."""
    return load_task("kinship", train_size=size) if data is None else load_task("clutrr", data, train_size=size)


def workload(tokenizer, data: str | Path | None, size: int = EXAMPLES) -> Workload:
    """The task's first training examples, encoded."""
    chosen = task(data, size)
    source = "CLUTRR" if data is not None else "built-in kinship stories (no data folder given)"
    rows = [encode(tokenizer, example, None) for example in chosen.train[:size]]
    return Workload(rows, pad_token_id(tokenizer), source)


def stock_batches(rows: Sequence[Encoded], pad: int) -> list[dict[str, Tensor]]:
    """As a stock Trainer makes them: in the order they come, right-padded, labels over the whole width."""
    kept = ("input_ids", "attention_mask", "labels")
    collate = CompletionCollator(pad, pad_to_multiple_of=1)
    return [{key: batch[key] for key in kept} for batch in _batches(rows, collate)]


def grouped_batches(rows: Sequence[Encoded], collate: Collate) -> list[dict[str, Tensor]]:
    """As our engine makes them: examples of like length together, the longest first. collate: the engine's collator."""
    batches = _batches(_by_length(rows), collate)
    return batches[-1:] + batches[:-1]


def real_tokens(rows: Sequence[Encoded]) -> int:
    """Tokens that are not padding."""
    return sum(len(row["input_ids"]) for row in rows)


def _by_length(rows: Sequence[Encoded]) -> list[Encoded]:
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def _batches(rows: Sequence[Encoded], collate: Collate) -> list[dict[str, Tensor]]:
    return [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
