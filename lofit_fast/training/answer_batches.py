"""Batches of answers alone: each row is the last prompt token and the answer, after a prompt computed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from lofit_fast.data.collate import Batch, Logits, kept
from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.data.padding import rectangle
from lofit_fast.models.prompt_states import PROMPTS, Slots
from lofit_fast.training.prefix_cache.store import PrefixStore

Collator = Callable[[Sequence[Encoded]], Batch]


@dataclass(frozen=True)
class AnswerCollator:
    """Encoded examples -> what follows their prompts, (B, A), and the prompts' keys and values, (B, P, W).

    Emits input_ids, position_ids and labels (B, A) int64, padded on the right, where labels are those of the next
    token; attention_mask (B, P + A), prompts padded on the left; PROMPTS (B, P, W) in the model's dtype; and what
    CompletionCollator emits for logits of labelled tokens alone. Only what the labels need goes through the model: the
    tokens from the last one before the first label to the last one before the last label.
    slots: where the layers' parts lie in what the store has of a token.
    collator: makes the batch, of whole examples, where a prompt is not in the store.
    pinned: lay the prompts in memory that a device copies from by itself, beside a step; a data loader's process, which
    has no device, does not.
    """

    collator: Collator
    store: PrefixStore
    slots: Slots
    pad_token_id: int
    logits: Logits
    pinned: bool = False

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        """Raises ValueError for a batch without a single label."""
        spans = [span(row) for row in rows]
        if None in spans:
            return self.collator(rows)
        found = [self._prompt(row["input_ids"][:start]) for row, (start, _) in zip(rows, spans, strict=True)]
        if any(states is None for states in found):
            return self.collator(rows)
        prompts = self.slots.laid(found, pinned=self.pinned and get_worker_info() is None)
        width = prompts.shape[1]
        pairs = list(zip(rows, spans, strict=True))
        ids = rectangle([row["input_ids"][start:end] for row, (start, end) in pairs], self.pad_token_id)
        following = rectangle([row["labels"][start + 1 : end + 1] for row, (start, end) in pairs], IGNORED)
        starts = torch.tensor([[start] for start, _ in spans])
        seen = torch.arange(width + ids.shape[1])
        return {
            "labels": following,
            **kept(following, self.logits),
            "input_ids": ids,
            "position_ids": starts + torch.arange(ids.shape[1]),
            # padding after an answer is on the right of all that counts, and hides nothing from itself
            "attention_mask": (seen >= width - starts).long(),
            PROMPTS: prompts,
        }

    def _prompt(self, ids: Sequence[int]) -> Tensor | None:
        """(len(ids), W), or None where it is not in the store."""
        return self.store.find(ids) if ids else self.store.states[:0]


def span(row: Encoded) -> tuple[int, int] | None:
    """(start, end): the tokens that an answer takes through the model, see `AnswerCollator`; None without labels.

    start is as many tokens as its prompt has but for the last.
    """
    labelled = [place for place, label in enumerate(row["labels"]) if label != IGNORED and place]
    return (labelled[0] - 1, labelled[-1]) if labelled else None


def prompts_of(rows: Sequence[Encoded]) -> list[tuple[int, ...]]:
    """The distinct prompts that batches of these rows go on from, but for their last tokens, the shortest first."""
    spans = ((row, span(row)) for row in rows)
    distinct = {tuple(row["input_ids"][: found[0]]) for row, found in spans if found}
    return sorted(distinct - {()}, key=lambda prompt: (len(prompt), prompt))
