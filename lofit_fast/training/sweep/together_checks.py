"""What a model must be for runs to share a pass: no row of a batch may change what another one learns."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lofit_fast.data.collate import CompletionCollator, on_device
from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.evaluation.choices import length_refusal
from lofit_fast.models.base_digest import dropout_of
from lofit_fast.models.trials import all_logits, difference, rounding, trial_examples, trying
from lofit_fast.patching.placement import device_of


def check_no_dropout(model: nn.Module) -> None:
    """Raise ValueError for a model with dropout, whose random numbers are drawn for a whole batch."""
    if (found := next(filter(None, map(dropout_of, model.modules())), None)) is not None:
        raise ValueError(
            f"runs cannot be trained together in a model with dropout, which draws random numbers for a whole batch: "
            f"{found}; expected together=1"
        )


def check_plain_loss(model: nn.Module) -> None:
    """Raise ValueError for a model whose loss is not the cross-entropy of its logits, which is what runs share.

    Tried on a few tokens. A mixture of experts may add a penalty on its routers, of a whole batch.
    """
    batch = on_device(CompletionCollator(0, logits="all")(trial_examples(model)), device_of(model))
    following = pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    try:
        with trying(model):
            out = model(**batch, use_cache=False)
        loss, logits = out.loss, out.logits.flatten(0, -2).float()
        plain = cross_entropy(logits, following.flatten(), ignore_index=IGNORED)
        # one sum in another order, in the dtype that the model computes its loss in
        exact = max(torch.finfo(loss.dtype).eps, torch.finfo(torch.float32).eps)
    # it needs more than tokens, or cannot run here: a step says by itself what is wrong
    except Exception:
        return
    if not torch.isclose(loss.double(), plain.double(), rtol=min(rounding(model), 100 * exact), atol=0.0):
        raise ValueError(
            f"runs cannot be trained together in a {type(model).__name__}, whose loss is {loss:.6g} where the "
            f"cross-entropy of its logits is {plain:.6g} (output_router_logits=True adds a penalty, say): expected "
            "together=1"
        )


def check_rows_apart(model: nn.Module, pad_id: int) -> None:
    """Raise ValueError for a model whose logits of a row depend on the other rows of a batch, or on their length.

    A batch of several runs is as long as the longest row of any of them, and each run has its own rows elsewhere by
    itself. Tried on a few tokens; rotary embeddings that switch with the length, far beyond those, are known by the
    config. pad_id: what fills up a row.
    """
    reason = length_refusal(model) or _rows_mixed(model, pad_id)
    if reason:
        raise ValueError(
            f"runs cannot be trained together in a {type(model).__name__}, in which the rows of one run would change "
            f"those of another: {reason}; expected together=1"
        )


def _rows_mixed(model: nn.Module, pad_id: int) -> str | None:
    longest, *_, shortest = trial_examples(model)
    other = trial_examples(model, other=True)[0]

    def logits(rows: list[Encoded]) -> Tensor:
        """(rows, longest row, vocabulary)"""
        return all_logits(model, CompletionCollator(pad_id, logits="all", pad_to_multiple_of=1)(rows)).float()

    try:
        with trying(model):
            for row, beside, of in ((shortest, longest, "another"), (longest, other, "its own")):
                alone, both = logits([row]), logits([row, beside])[:1, : len(row["input_ids"])]
                if alone.isfinite().all() and (away := difference(both, alone)) > rounding(model):
                    return f"logits of a row beside one of {of} length are {away:.1e} away from those of it alone"
    # it needs more than tokens, or cannot run here: a step says by itself what is wrong
    except Exception:
        return None
    return None
