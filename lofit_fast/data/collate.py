"""From encoded examples to batches whose logits are computed only where there is a label."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.data.padding import padded, rectangle


@dataclass(frozen=True)
class CompletionCollator:
    """Encoded examples -> a right-padded batch whose logits are computed only where a label is.

    Emits input_ids, attention_mask and labels (B, S) int64; logits_to_keep (B, S) bool, true where the next token has
    a label; shift_labels (labelled tokens,) int64, in the order of the kept rows. Hugging Face models slice the hidden
    states with the first before their output layer and take the second as the loss's targets: the same loss as with
    full logits, exactly, and no vocabulary-sized row that nobody reads. Works under any Trainer; evaluation needs
    prediction_loss_only=True, since the logits lose their batch shape.
    packed: lay the examples end to end in one row instead, each with positions from 0 and no mask, from which the
    models tell them apart: input_ids, position_ids, labels and logits_to_keep are then (1, tokens).
    pad_to_multiple_of: widths of padded batches. Few widths, and even ones, are faster and leave less memory in pieces.
    """

    pad_token_id: int
    packed: bool = False
    pad_to_multiple_of: int = 8

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Raises ValueError for a batch without a single label."""
        multiple = 1 if self.packed else self.pad_to_multiple_of
        ids, mask = padded([row["input_ids"] for row in rows], self.pad_token_id, multiple_of=multiple)
        labels = rectangle([row["labels"] for row in rows], IGNORED, multiple_of=multiple)
        if self.packed:
            real, width = mask.bool(), ids.shape[1]
            # nothing predicts the first token of an example
            labels[:, 0] = IGNORED
            position = torch.arange(width).expand(len(rows), width)[real][None]
            return _targets(labels[real][None]) | {"input_ids": ids[real][None], "position_ids": position}
        return _targets(labels) | {"input_ids": ids, "attention_mask": mask}


def _targets(labels: Tensor) -> dict[str, Tensor]:
    keep, shift_labels = kept(torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)), 1))
    return {"labels": labels, "logits_to_keep": keep, "shift_labels": shift_labels}


def kept(following: Tensor) -> tuple[Tensor, Tensor]:
    """(where the next token has a label, those labels in order). following: (B, S), the label of the next token.

    Raises ValueError where there is none.
    """
    keep = following != IGNORED
    if not keep.any():
        raise ValueError("a batch has no labels: every example's tokens are ignored")
    return keep, following[keep]
