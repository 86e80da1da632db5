"""Where a head looks: its attention over the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lofit_fast.config import Head
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.patched import acting_on, evaluating
from lofit_fast.patching.placement import device_of
from lofit_fast.training.engine.attention_scope import UnusableAttention, attending


def attention_maps(handle: LofitHandle, ids: Sequence[int], heads: Iterable[Head]) -> dict[Head, Tensor]:
    """(S, S) weights of each head, float32 on the CPU: a row per token that looks, a column per token looked at.

    ids: S tokens. The adapter acts, one for answers alone on the last token, where an answer would begin. Empty for a
    model whose attention keeps no weights: one with attention code of its own, or none that transformers can compute
    step by step.
    """
    prompt = torch.tensor([list(ids)], device=device_of(handle.model))
    answer = torch.zeros_like(prompt, dtype=torch.bool)
    answer[:, -1] = True
    try:
        with attending(handle.model, "eager"), evaluating(handle.model), acting_on(handle.model, answer):
            kept = handle.model(input_ids=prompt, use_cache=False, output_attentions=True).attentions
    except UnusableAttention:
        return {}
    # a model may keep those of its attention layers alone
    numbers = [p.layer for p in handle.projections]
    if not kept or len(kept) != len(numbers) or any(weights is None for weights in kept):
        return {}
    by_layer = dict(zip(numbers, kept, strict=True))
    return {(layer, head): by_layer[layer][0, head].float().cpu() for layer, head in heads}
