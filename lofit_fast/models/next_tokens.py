"""Whether a model predicts next tokens from those before them, which training on answers takes it to do."""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss

from lofit_fast.data.collate import CompletionCollator, on_device
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.trials import SHARED, difference, rounding, trial_examples, trying
from lofit_fast.patching.placement import device_of
from lofit_fast.patching.sharding import is_shared


def check_next_tokens(model: nn.Module, *, own_loss: bool = True) -> None:
    """Raise ValueError for a model whose tokens see those after them, or whose loss is of another kind.

    The former are encoders, those of BERT's kin whose config does not say is_decoder=True, and models with an encoder,
    which would read the answer there. own_loss: whether the model's own loss is trained on. That of the decoders of
    BART and its kin compares the logits at each token with that token, for labels that are shifted beforehand.
    Tried on a few tokens; not where the class is known to be a decoder with transformers' own loss, nor where
    processes hold the model together.
    """
    if _is_known(model) or is_shared(model):
        return
    batch = on_device(CompletionCollator(0, logits="all")(trial_examples(model)), device_of(model))
    labels, name, allowed = batch["labels"], type(model).__name__, rounding(model)
    try:
        with trying(model):
            out = model(**batch, use_cache=False)
        logits, loss = out.logits.float(), out.loss.float()
        # what all examples begin with is the same in each, whatever comes after it
        alike = logits[:, :SHARED]
        leak = difference(alike[1:], alike[:1].expand_as(alike[1:])) if alike.isfinite().all() else 0.0
        same, following = _loss(logits, labels), _loss(logits[:, :-1], labels[:, 1:])
    # it needs more than tokens, or cannot run here: training says by itself what is wrong
    except Exception:
        return
    # one batch, so that hardly a sum is in another order
    if leak > allowed / 10:
        raise ValueError(
            f"tokens of a {name} see those that come after them (its logits at the beginning of a text move by "
            f"{leak:.1e} with the rest of it), so that it would be trained on answers that it has read: expected a "
            "decoder, as BERT's kin are with is_decoder=True in their config"
        )
    away = (loss - same).abs()
    if own_loss and away <= allowed * same and away < (loss - following).abs():
        raise ValueError(
            f"the loss of a {name} compares the logits at each token with that token (it is {loss:.4g}; of next tokens "
            f"it would be {following:.4g}), so that nothing of use is learned from it: expected a model whose loss is "
            "of next tokens, as that of decoder-only models is"
        )


def _is_known(model: nn.Module) -> bool:
    """Whether a model's class is a decoder by its code, and computes its loss by transformers' own for such."""
    # accelerate's forward moves inputs between devices, and goes on with the class's
    replaced = "forward" in vars(model) and not hasattr(model, "_hf_hook")
    if replaced or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    try:
        made, forward = (inspect.getsource(getattr(type(model), name)) for name in ("__init__", "forward"))
    # of a class that was made without a file
    except (OSError, TypeError):
        return False
    # classes that are decoders where their config says so look there when they are made
    fixed = "is_decoder" not in made and "self.loss_function(" in forward
    return fixed and getattr(model, "loss_function", None) is ForCausalLMLoss


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: (B, S, vocabulary). labels: (B, S)."""
    return cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED)
