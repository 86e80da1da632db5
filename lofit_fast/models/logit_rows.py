"""Which logits a model can be asked for: forwards differ, and some have been replaced by another library's."""

from __future__ import annotations

import torch
from torch import nn

from lofit_fast.data.collate import CompletionCollator, Logits, on_device
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.trials import difference, rounding, trial_examples, trying
from lofit_fast.patching.placement import device_of


def logit_rows(model: nn.Module) -> Logits:
    """How a batch may ask the model for the logits of labelled tokens: the first of "rows", "columns", "all".

    "rows": by a mask (B, S), which transformers' own forwards take. "columns": by the places (columns,) where any row
    of the batch has a label, which Liger's take. "all": not at all. What works gives the logits and the loss that the
    model gives when it computes them all. A model that cannot do even that gets "rows", and says by itself what is
    wrong.
    """
    rows = trial_examples(model)
    # what a mask keeps of each row differs
    rows[0]["labels"][-2:] = [IGNORED] * 2
    try:
        with trying(model):
            batches = {way: CompletionCollator(0, logits=way)(rows) for way in ("all", "rows", "columns")}
            whole = _run(model, batches["all"])
            for way in ("rows", "columns"):
                if _works(model, way, batches[way], whole):
                    return way
    # it needs more than tokens, or cannot run here
    except Exception:
        return "rows"
    return "all"


def _run(model: nn.Module, batch):
    return model(**on_device(batch, device_of(model)), use_cache=False)


def _works(model: nn.Module, way: Logits, batch, whole) -> bool:
    keep = batch["logits_to_keep"].to(whole.logits.device)
    expected = whole.logits[keep] if way == "rows" else whole.logits[:, keep]
    try:
        got = _run(model, batch)
    # whatever a forward makes of what it does not know
    except Exception:
        return False
    allowed = rounding(model)
    logits = difference(got.logits.reshape(-1, got.logits.shape[-1]), expected.reshape(-1, expected.shape[-1]))
    loss = torch.isclose(got.loss.double(), whole.loss.double(), rtol=allowed, atol=allowed)
    return logits <= allowed and bool(loss)
