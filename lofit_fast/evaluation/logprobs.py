"""How likely the base model under an adapter finds preferred and rejected answers: DPO's reference, without a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lofit_fast.data.collate import Batch, Logits, on_device
from lofit_fast.data.encode import IGNORED, Encoded, check_unlike, encode_answers, pad_token_id
from lofit_fast.data.lengths import check_count, longest_first
from lofit_fast.data.padding import padded, padded_on_the_right, rectangle
from lofit_fast.evaluation.division import Division
from lofit_fast.evaluation.finite_logits import check_log_probs
from lofit_fast.models.head_trial import longest_head, withheld
from lofit_fast.models.linear_loss import FrozenHead, Watched, token_log_probs
from lofit_fast.models.logit_rows import logit_rows
from lofit_fast.models.vocabulary import check_ids, check_padding
from lofit_fast.patching.answer_positions import answers_of
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.patched import acting_on
from lofit_fast.patching.placement import device_of
from lofit_fast.tasks.chat import Rendered
from lofit_fast.torch_defaults import on_the_cpu

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Add = Callable[[Batch, Sequence[Encoded]], Batch]
TEXTS = ("prompt", "chosen", "rejected")
# columns that are true where a chat template has made the text, with all special tokens it needs
RENDERED = {name: f"{name}_rendered" for name in TEXTS}


class Switchable(Protocol):
    """Something in a model that can be switched off for a while. `LofitHandle` is one."""

    model: nn.Module

    def disabled(self) -> AbstractContextManager[None]:
        """A scope in which the model computes what the base computes."""


def reference_logprobs(
    attachment: Switchable,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
    add: Add | None = None,
    as_trained: bool = False,
) -> Dataset:
    """The data set with what the base model under an attachment makes of it, for TRL's DPO.

    dataset: of the `datasets` library, with the texts prompt, chosen and rejected. The columns added, or replaced:
    prompt_ids, chosen_ids, rejected_ids: token ids of prompt and answers, tokenized joined, answers with an
    end-of-sequence token. Where an answer changes the last tokens of the prompt, both answers begin before the change,
    and a `BoundaryWarning` says so. ref_chosen_logps, ref_rejected_logps: log p(answer and end | prompt), summed over
    its tokens, of the model as it is with the attachment disabled. TRL's collator reads exactly these. TRL's own
    trainer would tokenize again and compute a reference from the active model;
    `preference_trainer.ReferencedDPOTrainer` does not.
    An answer that occurs more than once with the same prompt is computed once. batch_size: answers per forward. add,
    as_trained: as in `log_probs`.
    Columns "prompt_rendered", "chosen_rendered" and "rejected_rendered", each of which may be missing, say which texts
    a chat template has made: no special tokens and no end token are added to those.
    Raises ValueError for a column that is missing or not of texts, an answer without tokens or with some that the model
    has no embedding for, two answers of the same tokens, a prompt and answer of more than max_length tokens, or a
    batch_size below 1.
    """
    check_count("batch_size", batch_size)
    texts = {name: _column(dataset, name) for name in TEXTS}
    for name, mark in RENDERED.items():
        if mark in dataset.column_names:
            marked = zip(texts[name], dataset[mark], strict=True)
            texts[name] = [Rendered(text) if made else text for text, made in marked]
    end = tokenizer.eos_token or ""
    # data for TRL may bring the end token along
    answers = [
        [text if isinstance(text, Rendered) else text.removesuffix(end) for text in texts[side]] for side in TEXTS[1:]
    ]
    pairs = encode_answers(tokenizer, zip(texts["prompt"], zip(*answers, strict=True), strict=True), max_length)
    for number, (chosen, rejected) in enumerate(pairs, start=1):
        check_unlike(chosen["input_ids"], rejected["input_ids"], f"row {number}: chosen and rejected")
    sides = dict(zip(TEXTS[1:], zip(*pairs, strict=True), strict=True)) if pairs else {}
    for name, side in sides.items():
        check_ids(attachment.model, [row["input_ids"] for row in side], name)
    check_padding(attachment.model, pad_token_id(tokenizer), pairs)
    # one forward for what occurs more than once
    rows = {_key(row): row for side in sides.values() for row in side}
    with attachment.disabled():
        how = {"batch_size": batch_size, "progress": progress, "add": add, "as_trained": as_trained}
        values = log_probs(attachment.model, list(rows.values()), pad_token_id(tokenizer), **how)
    scores = dict(zip(rows, values, strict=True))
    columns = {"prompt_ids": [_split(row)[0] for row in sides.get("chosen", ())]}
    columns |= {f"{side}_ids": [_split(row)[1] for row in rows] for side, rows in sides.items()}
    columns |= {f"ref_{side}_logps": [scores[_key(row)] for row in rows] for side, rows in sides.items()}
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


@on_the_cpu
def log_probs(
    model: nn.Module,
    rows: Sequence[Encoded],
    pad: int,
    batch_size: int = 16,
    progress: bool = False,
    add: Add | None = None,
    as_trained: bool = False,
) -> list[float]:
    """Per row the sum of log p over its labelled tokens, in float32 at least. Logits are made for those tokens only.

    In a launch of several processes all must call it with the same rows; they divide the batches.
    add: adds to a batch (input_ids, attention_mask) what else the model is to be called with for these rows.
    as_trained: whether the model computes as in a training step, which matters where such a step rounds otherwise.
    Raises FloatingPointError for a sum that is not finite.
    """
    division = Division(model, "reference")
    division.check_same(rows, "rows")
    batches = list(longest_first([len(row["input_ids"]) for row in rows], batch_size, "", False))
    values: dict[int, float] = {}
    device, logits, head = device_of(model), logit_rows(model), longest_head(model, rows, batch_size)
    with division.together(), torch.set_grad_enabled(as_trained), eval_mode(model), padded_on_the_right():
        for chosen, counts in division.batches(batches, progress):
            ids, mask = padded([rows[i]["input_ids"] for i in chosen], pad)
            labels = rectangle([rows[i]["labels"] for i in chosen], IGNORED)
            batch = {"input_ids": ids, "attention_mask": mask}
            if add is not None:
                batch = add(batch, [rows[i] for i in chosen])
            labels = labels.to(device)
            with acting_on(model, answers_of(labels)):
                if head is not None and head.is_long(n_following(labels)):
                    logp, _, _ = long_log_probs(model, on_device(batch, device), labels, logits, head)
                else:
                    output = model(**on_device(batch, device), **keeping(labels, logits))
                    logp = labelled_log_probs(output, labels, logits)
            if counts:
                values |= zip(chosen, logp.detach().sum(1).tolist(), strict=True)
    values = division.put_together(values)
    check_log_probs(values)
    return [values[i] for i in range(len(rows))]


def keeping(labels: Tensor, logits: Logits = "rows") -> dict[str, Tensor | bool]:
    """What a model is to be called with so that it makes logits where the next token has a label only.

    logits: how the model can be asked for them, see `models.logit_rows`.
    """
    following = labels[:, 1:] != IGNORED
    if logits == "all":
        return {"use_cache": False}
    keep = torch.cat((following, following.new_zeros(len(labels), 1)), 1)
    return {"logits_to_keep": keep if logits == "rows" else keep.any(0).nonzero().flatten(), "use_cache": False}


def labelled_log_probs(output: Any, labels: Tensor, logits: Logits = "rows") -> Tensor:
    """(B, S - 1): log p of every next token that has a label, 0 elsewhere. output: of a model called with `keeping`."""
    following = labels[:, 1:]
    rows = labelled_rows(output.logits, labels, logits)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    picked = wide.gather(1, following[following != IGNORED][:, None])[:, 0] - wide.logsumexp(1)
    return picked.new_zeros(following.shape).masked_scatter(following != IGNORED, picked)


def long_log_probs(
    given: Callable[..., Any],
    batch: dict[str, Any],
    labels: Tensor,
    logits: Logits,
    head: FrozenHead,
    watch: bool = False,
) -> tuple[Tensor, Watched | None, ModelOutput]:
    """`labelled_log_probs` of many labels, without logits of all of them at once; what is watched; the output.

    given: a model or its forward, called with the batch. head: its head, see `head_trial.frozen_head`.
    """
    following = labels[:, 1:]
    mask = following != IGNORED
    with withheld(head.module) as taken:
        output = given(**{**batch, **keeping(labels, logits)})
    hidden = taken[0] if taken[0].dim() == 3 else taken[0][None]
    rows = labelled_rows(hidden, labels, logits)
    picked, watched = token_log_probs(rows, head, following[mask], watch)
    return picked.new_zeros(following.shape).masked_scatter(mask, picked), watched, output


def n_following(labels: Tensor) -> int:
    """How many tokens of labels (B, S) are predicted."""
    return int((labels[:, 1:] != IGNORED).sum())


def labelled_rows(given: Tensor, labels: Tensor, logits: Logits = "rows") -> Tensor:
    """(labelled tokens, vocabulary): of what a model called with `keeping` gives, those before a label."""
    if logits == "rows":
        return given.flatten(0, -2)
    wanted = labels[:, 1:] != IGNORED
    return given[:, :-1][wanted] if logits == "all" else given[wanted[:, wanted.any(0)]]


def _column(dataset: Dataset, name: str) -> list[str]:
    if name not in dataset.column_names:
        raise ValueError(f"expected the columns {', '.join(TEXTS)}, got {dataset.column_names}")
    texts = list(dataset[name])
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"expected texts in the column {name}, got {type(wrong[0]).__name__}")
    return texts


def _key(row: Encoded) -> tuple[int, ...]:
    """What tells two rows apart: where the answer begins, and all ids."""
    return row["labels"].count(IGNORED), *row["input_ids"]


def _split(row: Encoded) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer)."""
    length = row["labels"].count(IGNORED)
    return row["input_ids"][:length], row["input_ids"][length:]
