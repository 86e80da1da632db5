"""Whether a model's loss is a sum over all labels of a step, divided by their number, or a mean of its own batch.

transformers hands the number (`num_items_in_batch`) to every forward that takes any keyword. Some compute a mean all
the same, and others take no keyword: the means of a step's batches are then no mean over the step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lofit_fast.data.collate import CompletionCollator, n_labels, on_device
from lofit_fast.models.trials import trial_examples, tried_once, trying
from lofit_fast.patching.placement import device_of

# how far from half a loss may be that was divided by twice the labels
_NEAR = 0.1


def divides_by_count(model: nn.Module) -> bool:
    """Whether the model divides its loss by the number of labels that it is called with: tried on a few tokens.

    True where that cannot be tried: transformers decides then, by the forward's keywords.
    """
    return tried_once(model, "label count", lambda: _tried(model))


def _tried(model: nn.Module) -> bool:
    batch = on_device(CompletionCollator(0, logits="all")(trial_examples(model)), device_of(model))
    twice = torch.tensor(2 * n_labels(batch), device=device_of(model))

    def loss(**count: Tensor) -> float:
        return float(model(**batch, **count, use_cache=False).loss)

    with trying(model):
        try:
            mean = loss()
        # it needs more than tokens, or cannot run here
        except Exception:
            return True
        try:
            got = loss(num_items_in_batch=twice)
        # whatever a forward makes of what it does not know
        except Exception:
            return False
    # of what is no number nothing can be told
    return not abs(got / mean - 0.5) > _NEAR if mean else True
