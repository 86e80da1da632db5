"""Which logits a model can be asked for: forwards differ, and some have been replaced by another library's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lofit_fast.data.collate import CompletionCollator, Logits, on_device, stock_logits
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.models.trials import difference, rounding, trial_examples, tried_once, trying
from lofit_fast.patching.placement import device_of

# all but the way of last resort, the best first; an index needs a scope of `row_index.selecting_rows`
SCOPED = ("index", "rows", "columns")


def logit_rows(model: nn.Module, ways: Sequence[Logits] = SCOPED[1:]) -> Logits:
    """How a batch may ask the model for the logits of labelled tokens: the first that works of the ways, or "all".

    "index": by places (rows,) in the flattened batch, in a scope of `row_index.selecting_rows`. "rows": by a mask
    (B, S), which transformers' own forwards take. "columns": by the places (columns,) where any row of the batch has a
    label, which Liger's take. "all": not at all. What works gives the logits and the loss that the model gives when it
    computes them all. A model that cannot do even that gets what transformers' own take, and says by itself what is
    wrong.
    """
    return tried_once(model, ("logits", tuple(ways)), lambda: _tried(model, ways))


def _tried(model: nn.Module, ways: Sequence[Logits]) -> Logits:
    rows = trial_examples(model)
    # what a mask keeps of each row differs
    rows[0]["labels"][-2:] = [IGNORED] * 2
    try:
        with trying(model):
            batches = {way: CompletionCollator(0, logits=way)(rows) for way in ("all", "rows", *ways)}
            whole = _run(model, batches["all"])
            # of all logits those that each way is to give
            keep = batches["rows"]["logits_to_keep"].to(whole.logits.device)
            for way in ways:
                expected = whole.logits[:, keep.any(0)] if way == "columns" else whole.logits[keep]
                if _works(model, batches[way], whole.loss, expected):
                    return way
    # it needs more than tokens, or cannot run here
    except Exception:
        return stock_logits()
    return "all"


def _run(model: nn.Module, batch):
    with selecting_rows(model):
        return model(**on_device(batch, device_of(model)), use_cache=False)


def _works(model: nn.Module, batch, whole: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        got = _run(model, batch)
    # whatever a forward makes of what it does not know
    except Exception:
        return False
    allowed = rounding(model)
    logits = difference(got.logits.reshape(-1, got.logits.shape[-1]), expected.reshape(-1, expected.shape[-1]))
    loss = torch.isclose(got.loss.double(), whole.double(), rtol=allowed, atol=allowed)
    return logits <= allowed and bool(loss)
