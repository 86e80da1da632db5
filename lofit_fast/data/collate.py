"""From encoded examples to batches whose logits are computed only where there is a label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Literal

import torch
from torch import Tensor

from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.data.padding import padded, rectangle

# which logits a model is asked for: those of labelled tokens, by mask or index, those of columns with one, or all
Logits = Literal["rows", "index", "columns", "all"]
LOGITS = ("rows", "index", "columns", "all")
# the index, in a batch
KEPT_ROWS = "kept_rows"
# the first transformers whose models take `logits_to_keep` as a mask
_MASKS_SINCE = (5, 21)
Batch = dict[str, Tensor | bool | int]


@cache
def stock_logits() -> Logits:
    """What the installed transformers' own forwards take: "rows", before 5.21 "columns"."""
    release = tuple(int(part) for part in version("transformers").split(".")[:2])
    return "rows" if release >= _MASKS_SINCE else "columns"


@dataclass(frozen=True)
class CompletionCollator:
    """Encoded examples -> a right-padded batch whose logits are computed only where a label is.

    Emits input_ids, attention_mask and labels (B, S) int64; logits_to_keep (B, S) bool, true where the next token has
    a label; shift_labels (labelled tokens,) int64, in the order of the kept rows. Hugging Face models slice the hidden
    states with the first before their output layer and take the second as the loss's targets: the same loss as with
    full logits, exactly, and no vocabulary-sized row that nobody reads. Works under any Trainer; evaluation needs
    prediction_loss_only=True, since the logits lose their batch shape.
    packed: lay the examples end to end in one row instead, each with positions from 0 and no mask, from which the
    models tell them apart: input_ids, position_ids, labels and logits_to_keep are then (1, tokens). The batch also
    brings use_cache=False, which is no tensor: with a cache, models take the whole row for one example.
    boundaries: packed batches also say where examples begin and end, as transformers' flash attention takes it:
    cu_seq_lens_q and cu_seq_lens_k (examples + 1,) int32, max_length_q and max_length_k. Otherwise every layer would
    find that out by itself.
    pad_to_multiple_of: widths of padded batches. Few widths, and even ones, are faster and leave less memory in pieces.
    logits: "rows" as above. "index" is for a model in a scope of `models.row_index.selecting_rows`: in place of the
    mask, kept_rows (labelled tokens,) int64 names its places in the flattened batch, and no device has to count it.
    "columns" is for a forward that takes no mask (Liger's): logits_to_keep (columns,) int64
    names the places where any example has a label, and shift_labels is (B, columns). "all" is for one without
    logits_to_keep: neither is emitted. `models.logit_rows` finds out what a model takes. By default "rows", and
    "columns" where transformers is older than 5.21, whose models take no mask: the same loss, of some more logits.
    Raises ValueError for another value of logits.
    """

    pad_token_id: int
    packed: bool = False
    pad_to_multiple_of: int = 8
    logits: Logits = field(default_factory=stock_logits)
    boundaries: bool = False

    def __post_init__(self) -> None:
        check_logits(self.logits)

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        """Raises ValueError for a batch without a single label."""
        multiple = 1 if self.packed else self.pad_to_multiple_of
        ids, mask = padded([row["input_ids"] for row in rows], self.pad_token_id, multiple_of=multiple)
        labels = rectangle([row["labels"] for row in rows], IGNORED, multiple_of=multiple)
        if self.packed:
            real, width = mask.bool(), ids.shape[1]
            # nothing predicts the first token of an example
            labels[:, 0] = IGNORED
            position = torch.arange(width).expand(len(rows), width)[real][None]
            batch = {"input_ids": ids[real][None], "position_ids": position, "use_cache": False}
            ends = _boundaries(mask.sum(1)) if self.boundaries else {}
            return self._targets(labels[real][None]) | batch | ends
        return self._targets(labels) | {"input_ids": ids, "attention_mask": mask}

    def _targets(self, labels: Tensor) -> dict[str, Tensor]:
        following = torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)), 1)
        targets = kept(following, self.logits)
        # a model that computes all logits shifts the labels by itself
        return {"labels": labels} if self.logits == "all" else {"labels": labels, **targets}


def _boundaries(lengths: Tensor) -> dict[str, Tensor | int]:
    ends = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def check_logits(logits: str) -> None:
    """Raise ValueError for what is none of LOGITS."""
    if logits not in LOGITS:
        raise ValueError(f"expected logits to be one of {', '.join(LOGITS)}, got {logits!r}")


def kept(following: Tensor, logits: Logits = "rows") -> dict[str, Tensor]:
    """logits_to_keep, or kept_rows, and shift_labels. following: (B, S), the label of the next token.

    Raises ValueError where there is no label.
    """
    keep = following != IGNORED
    if not keep.any():
        raise ValueError("a batch has no labels: every example's tokens are ignored")
    if logits == "all":
        return {"shift_labels": following}
    if logits == "columns":
        columns = keep.any(0).nonzero().flatten()
        return {"logits_to_keep": columns, "shift_labels": following[:, columns]}
    if logits == "index":
        return {KEPT_ROWS: keep.flatten().nonzero().flatten(), "shift_labels": following[keep]}
    return {"logits_to_keep": keep, "shift_labels": following[keep]}


def n_labels(batch: Mapping[str, Tensor]) -> int:
    """How many tokens of a collator's batch are predicted."""
    return int(labels_counted(batch))


def labels_counted(batch: Mapping[str, Tensor]) -> Tensor:
    """`n_labels` as a scalar where the batch is, so that no device is waited for."""
    following = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return (following != IGNORED).sum()


def on_device(batch: Mapping[str, Tensor | bool | int], device: torch.device | str) -> Batch:
    """A batch whose tensors are on a device; what is no tensor stays."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
