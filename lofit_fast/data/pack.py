"""From encoded examples to one row without padding, in which what all of them begin with stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from lofit_fast.data.collate import Batch, CompletionCollator, Logits, check_logits, kept, stock_logits
from lofit_fast.data.encode import IGNORED, Encoded

# the attention that reads packed rows, see `cpu.attention`
GROUPED = "lofit_grouped"
# a row of one token is a shape of its own to a compiler
_FEWEST_SHARED = 2


@dataclass(frozen=True)
class PackedCollator:
    """Encoded examples -> a packed row (1, N) for attention GROUPED, with logits only where a label is.

    Holds, for B examples: first the tokens that all of them begin with, as far as none of these predicts a label, then
    the rest of each. The last token of an example predicts nothing and is left out.
    Emits input_ids, position_ids and labels (1, N) int64, where labels are those of the next token; logits_to_keep
    (1, N) bool and shift_labels (labelled tokens,) int64 as CompletionCollator does; attention_mask (B, T) int64,
    packed_rows (B, T) and packed_places int64, see `cpu.packed_rows`. The loss is what it is without packing.
    A single example has nothing to be packed with: its batch is CompletionCollator's.
    tokens_multiple_of: N, by tokens without a label after examples shorter than the longest, which nobody sees.
    width_multiple_of: T.
    logits: what the model is asked for, as of `CompletionCollator`; shift_labels is emitted in any case.
    """

    pad_token_id: int
    tokens_multiple_of: int = 16
    width_multiple_of: int = 8
    logits: Logits = field(default_factory=stock_logits)

    def __post_init__(self) -> None:
        check_logits(self.logits)

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        """Raises ValueError for a batch without a single label."""
        if len(rows) == 1:
            alone = {"pad_to_multiple_of": self.width_multiple_of, "logits": self.logits}
            return CompletionCollator(self.pad_token_id, **alone)(rows)
        tokens = [list(row["input_ids"][:-1]) or list(row["input_ids"]) for row in rows]
        following = [[*row["labels"][1:], IGNORED][: len(ids)] for row, ids in zip(rows, tokens, strict=True)]
        shared = _shared(tokens, following)
        width = -(-max(map(len, tokens)) // self.width_multiple_of) * self.width_multiple_of
        real = [len(ids) for ids in tokens]
        self._fill(tokens, following, shared, width)

        lengths = torch.tensor([len(ids) for ids in tokens])[:, None]
        column = torch.arange(width)
        own = (column >= shared) & (column < lengths)
        places = own.flatten().nonzero().flatten()
        index = column.expand(len(rows), width).where(column < shared, -1)
        index[own] = torch.arange(shared, shared + len(places))
        targets = _laid(following, shared)
        return {
            "attention_mask": (column < torch.tensor(real)[:, None]).long(),
            "input_ids": _laid(tokens, shared),
            "position_ids": torch.cat((column[:shared], places % width))[None],
            "labels": targets,
            **kept(targets, self.logits),
            "packed_rows": index,
            "packed_places": places,
        }

    def _fill(self, tokens: list[list[int]], following: list[list[int]], shared: int, width: int) -> None:
        """Lengthen short examples, in place, until the number of tokens is a multiple, as far as there is room."""
        missing = -(shared + sum(len(ids) - shared for ids in tokens)) % self.tokens_multiple_of
        for ids, labels in zip(tokens, following, strict=True):
            more = min(missing, width - len(ids))
            ids += [self.pad_token_id] * more
            labels += [IGNORED] * more
            missing -= more


def _shared(tokens: Sequence[Sequence[int]], following: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with, none of which predicts a label; every example has one more of its own."""
    columns = zip(*tokens, strict=False), zip(*following, strict=False)
    alike = takewhile(lambda pair: len(set(pair[0])) == 1 and set(pair[1]) == {IGNORED}, zip(*columns, strict=True))
    count = min(sum(1 for _ in alike), min(map(len, tokens)) - 1)
    return count if count >= _FEWEST_SHARED else 0


def _laid(rows: Sequence[Sequence[int]], shared: int) -> Tensor:
    """(1, N): the first `shared` of a row, then the rest of each."""
    return torch.tensor([[*rows[0][:shared], *(value for row in rows for value in row[shared:])]])
