"""Which prompts are continued in one batch: those beside which a prompt's greedy answer is the one that it has alone.

Prompts of unlike length are padded on the left. Families lose sight of that in many ways: positions that count the
padding, states that run on through it, attention that picks tokens in it. And some mix the rows of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import groupby

import torch
from torch import Tensor, nn

from lofit_fast.data.lengths import longest_first
from lofit_fast.data.padding import padded
from lofit_fast.evaluation.choices import length_refusal
from lofit_fast.evaluation.division import Division
from lofit_fast.evaluation.generation_settings import StandingAlone
from lofit_fast.models.row_picks import picks_in_rows
from lofit_fast.models.trials import difference, rounding, trial_examples, tried_once, trying
from lofit_fast.patching.placement import device_of

# tokens: one after the prompt, the others after the cache
_NEW = 3


class Beside(IntEnum):
    """What a prompt may share a batch with: any prompt, one of its length, or none."""

    ANY = 0
    EQUAL = 1
    NONE = 2


# of a prompt that is tried beside another
_LENGTHS = {Beside.ANY: "another", Beside.EQUAL: "its own"}
_SAID = {
    Beside.EQUAL: "only prompts of equal length are continued together",
    Beside.NONE: "each prompt is continued by itself",
}


def prompt_batches(
    model: nn.Module, lengths: Sequence[int], batch_size: int, pad: int, division: Division
) -> list[list[int]]:
    """Indices of prompts in batches, the longest first, in each of which every prompt has the answer it has alone.

    The model is tried on a few tokens; a warning says so where it takes fewer prompts at a time than asked for. All
    processes of a division have the same batches.

    Args:
        model: patched or not, in a scope of `handle.evaluating`.
        lengths: tokens per prompt.
        batch_size: prompts per batch, at most.
        pad: the id that fills up a batch.
        division: of the batches.
    """
    batches = list(longest_first(lengths, batch_size, "", False))
    if all(len(rows) == 1 for rows in batches):
        return batches
    beside = tried_once(model, ("prompts in a batch", pad), lambda: _tried(model, pad, division))
    beside = division.most(beside)
    if beside is Beside.ANY:
        return batches
    order = [row for rows in batches for row in rows]
    if beside is Beside.NONE:
        return [[row] for row in order]
    alike = (list(rows) for _, rows in groupby(order, key=lambda row: lengths[row]))
    return [rows[start : start + batch_size] for rows in alike for start in range(0, len(rows), batch_size)]


def _tried(model: nn.Module, pad: int, division: Division) -> Beside:
    """Warns of less than any."""
    reason = length_refusal(model)
    if reason is None and (picks := picks_in_rows(model)):
        reason = f"it picks what it attends to among padding too ({picks} of its config)"
    beside = Beside.ANY if reason is None else Beside.EQUAL
    longest, *_, shortest = (row["input_ids"] for row in trial_examples(model))
    other = trial_examples(model, other=True)[0]["input_ids"]
    try:
        with trying(model):
            for pair in ([longest, shortest], [longest, other])[beside:]:
                away = _away(model, pair, pad)
                if away <= rounding(model):
                    break
                length = _LENGTHS[beside]
                beside = Beside(beside + 1)
                reason = (
                    f"logits after a prompt beside one of {length} length are {away:.1e} away from those after it alone"
                )
    except Exception:
        # others may wait for this one in the midst of a forward. alone, a model says what is wrong when it generates
        if division.shares:
            raise
    if beside is not Beside.ANY:
        warnings.warn(
            f"{type(model).__name__}'s answers would depend on the batch: {reason}. So {_SAID[beside]}", stacklevel=2
        )
    return beside


def _away(model: nn.Module, pair: Sequence[list[int]], pad: int) -> float:
    """How far the logits of two prompts in a batch are from those of each alone; 0 where these are no numbers."""
    together, away = list(_steps(model, pair, pad)), 0.0
    for row, prompt in enumerate(pair):
        for both, (logits, token) in zip(together, _steps(model, [prompt], pad), strict=True):
            if not logits.isfinite().all():
                return 0.0
            away = max(away, difference(both[0][row : row + 1], logits))
            # a near tie: what follows another token is another text
            if both[1][row] != token[0]:
                break
    return away


def _steps(model: nn.Module, prompts: Sequence[list[int]], pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Per new token (logits (B, vocabulary), the tokens (B,))."""
    ids, mask = (part.to(device_of(model)) for part in padded(prompts, pad, side="left"))
    told = {"output_logits": True, "return_dict_in_generate": True}
    how = StandingAlone(do_sample=False, max_new_tokens=_NEW, pad_token_id=pad, **told)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
    yield from zip(out.logits, torch.unbind(out.sequences[:, ids.shape[1] :], 1), strict=True)
