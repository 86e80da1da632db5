"""Rows that vectors on answers alone can be trained on: those with a single place from which the vectors act."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lofit_fast.data.encode import IGNORED, Encoded


def check_one_answer(rows: Sequence[Encoded], what: str = "example") -> None:
    """Raise ValueError for an example with several answers: one row has a single place from which vectors may act.

    The prompt of a later answer holds the answers before it, which the vectors would have to leave alone. what: an
    example is called in the error.
    """
    for number, row in enumerate(rows, start=1):
        learned = [label != IGNORED for label in row["labels"]]
        begins = sum(here and not before for before, here in pairwise([False, *learned]))
        if begins > 1:
            raise ValueError(
                f"{what} {number} has {begins} answers, expected 1 for vectors that act on answers alone "
                "(positions='answer'): learn the last turn of each conversation (train_on='last', --train-on last)"
            )
