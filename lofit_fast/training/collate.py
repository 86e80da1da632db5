"""From encoded examples to batches whose logits are computed only where there is a label."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lofit_fast.encoding import IGNORED, Encoded


@dataclass(frozen=True)
class CompletionCollator:
    """Encoded examples -> a right-padded batch whose logits are computed only where a label is.

    Emits input_ids, attention_mask and labels (B, S) int64; logits_to_keep (B, S) bool, true where the next token has
    a label; shift_labels (labelled tokens,) int64, in the order of the kept rows. Hugging Face models slice the hidden
    states with the first before their output layer and take the second as the loss's targets: the same loss as with
    full logits, exactly, and no vocabulary-sized row that nobody reads. Works under any Trainer; evaluation needs
    prediction_loss_only=True, since the logits lose their batch shape.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Raises ValueError for a batch without a single label."""
        width = max(len(row["input_ids"]) for row in rows)
        labels = torch.full((len(rows), width), IGNORED)
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[i, :length] = torch.tensor(row["input_ids"])
            labels[i, :length] = torch.tensor(row["labels"])
            mask[i, :length] = 1
        following = torch.cat((labels[:, 1:], labels.new_full((len(rows), 1), IGNORED)), 1)
        keep = following != IGNORED
        if not keep.any():
            raise ValueError("a batch has no labels: every example's tokens are ignored")
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "logits_to_keep": keep,
            "shift_labels": following[keep],
        }
