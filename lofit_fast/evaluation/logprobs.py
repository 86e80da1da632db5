"""How likely the base model under an adapter finds preferred and rejected answers: DPO's reference, without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lofit_fast.data.encode import IGNORED, Encoded, encode, pad_token_id
from lofit_fast.data.lengths import longest_first
from lofit_fast.data.padding import padded, rectangle
from lofit_fast.patching.layer import eval_mode
from lofit_fast.patching.placement import device_of
from lofit_fast.tasks.task import Example

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("prompt", "chosen", "rejected")


class Switchable(Protocol):
    """Something in a model that can be switched off for a while. `LofitHandle` is one."""

    model: nn.Module

    def disabled(self) -> AbstractContextManager[None]:
        """A scope in which the model computes what the base computes."""


def reference_logprobs(
    attachment: Switchable,
    dataset: Dataset,
    tokenizer,
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Dataset:
    """The data set with what the base model under an attachment makes of it, for TRL's DPO.

    dataset: of the `datasets` library, with the texts prompt, chosen and rejected. The columns added, or replaced:
    prompt_ids, chosen_ids, rejected_ids: token ids, prompt and answers tokenized apart, answers with an
    end-of-sequence token. ref_chosen_logps, ref_rejected_logps: log p(answer and end | prompt), summed over its tokens,
    of the model as it is with the attachment disabled. TRL's collator reads exactly these. TRL's own trainer would
    tokenize again and compute a reference from the active model; `preference_trainer.ReferencedDPOTrainer` does not.
    An answer that occurs more than once with the same prompt is computed once. batch_size: answers per forward.
    Raises ValueError for a column that is missing or not of texts, an answer without tokens, or a prompt and answer of
    more than max_length tokens.
    """
    texts = {name: _column(dataset, name) for name in TEXTS}
    pairs = {side: list(zip(texts["prompt"], texts[side], strict=True)) for side in ("chosen", "rejected")}
    rows = {pair: _encoded(tokenizer, *pair, max_length) for side in pairs.values() for pair in side}
    with attachment.disabled():
        values = log_probs(attachment.model, list(rows.values()), pad_token_id(tokenizer), batch_size, progress)
    scores = dict(zip(rows, values, strict=True))
    columns = {"prompt_ids": [_split(rows[pair])[0] for pair in pairs["chosen"]]}
    columns |= {f"{side}_ids": [_split(rows[pair])[1] for pair in pairs[side]] for side in pairs}
    columns |= {f"ref_{side}_logps": [scores[pair] for pair in pairs[side]] for side in pairs}
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


@torch.no_grad()
def log_probs(
    model: nn.Module, rows: Sequence[Encoded], pad: int, batch_size: int = 16, progress: bool = False
) -> list[float]:
    """Per row the sum of log p over its labelled tokens, in float32 at least. Logits are made for those tokens only."""
    values = [0.0] * len(rows)
    device = device_of(model)
    with eval_mode(model):
        for chosen in longest_first([len(row["input_ids"]) for row in rows], batch_size, "reference", progress):
            ids, mask = padded([rows[i]["input_ids"] for i in chosen], pad)
            labels = rectangle([rows[i]["labels"] for i in chosen], IGNORED)
            ids, labels, mask = (part.to(device) for part in (ids, labels, mask))
            logp = labelled_log_probs(model(input_ids=ids, attention_mask=mask, **keeping(labels)), labels)
            for i, value in zip(chosen, logp.sum(1).tolist(), strict=True):
                values[i] = value
    return values


def keeping(labels: Tensor) -> dict[str, Tensor | bool]:
    """What a Hugging Face model is to be called with so that it makes logits where the next token has a label only."""
    following = labels[:, 1:] != IGNORED
    return {"logits_to_keep": torch.cat((following, following.new_zeros(len(labels), 1)), 1), "use_cache": False}


def labelled_log_probs(output, labels: Tensor) -> Tensor:
    """(B, S - 1): log p of every next token that has a label, 0 elsewhere. output: of a model called with `keeping`."""
    logits = output.logits.flatten(0, -2)
    following = labels[:, 1:]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = wide.gather(1, following[following != IGNORED][:, None])[:, 0] - wide.logsumexp(1)
    return picked.new_zeros(following.shape).masked_scatter(following != IGNORED, picked)


def _column(dataset: Dataset, name: str) -> list[str]:
    if name not in dataset.column_names:
        raise ValueError(f"expected the columns {', '.join(TEXTS)}, got {dataset.column_names}")
    texts = list(dataset[name])
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"expected texts in the column {name}, got {type(wrong[0]).__name__}")
    return texts


def _encoded(tokenizer, prompt: str, answer: str, max_length: int | None) -> Encoded:
    # data for TRL may bring the end token along
    return encode(tokenizer, Example(prompt, answer.removesuffix(tokenizer.eos_token or "")), max_length)


def _split(row: Encoded) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer)."""
    length = row["labels"].count(IGNORED)
    return row["input_ids"][:length], row["input_ids"][length:]
