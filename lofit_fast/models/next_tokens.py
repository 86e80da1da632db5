"""Whether a model's loss is that of next tokens, which a training on completions takes it for."""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss

from lofit_fast.data.collate import CompletionCollator, on_device
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.trials import rounding, trial_examples, trying
from lofit_fast.patching.placement import device_of
from lofit_fast.patching.sharding import is_shared


def check_next_tokens(model: nn.Module) -> None:
    """Raise ValueError for a model whose loss compares the logits at a token with that very token.

    Such are the decoders of BART and its kin, which take labels that are shifted already, models of masked tokens, and
    those with an encoder, which would read the answer there. Tried on a few tokens; not where the forward calls
    transformers' own causal loss, which shifts, nor where processes hold the model together.
    """
    if _calls_causal_loss(model) or is_shared(model):
        return
    batch = on_device(CompletionCollator(0, logits="all")(trial_examples(model)), device_of(model))
    labels = batch["labels"]
    try:
        with trying(model):
            out = model(**batch, use_cache=False)
            loss = out.loss.float()
            same, following = _loss(out.logits, labels), _loss(out.logits[:, :-1], labels[:, 1:])
    # it needs more than tokens, or cannot run here: training says by itself what is wrong
    except Exception:
        return
    away = (loss - same).abs()
    if away <= rounding(model) * same and away < (loss - following).abs():
        raise ValueError(
            f"the loss of a {type(model).__name__} compares the logits at each token with that token (it is "
            f"{loss:.4g}; of next tokens it would be {following:.4g}), so that nothing of use is learned from it: "
            "expected a model whose loss is of next tokens, as decoder-only models' is"
        )


def _calls_causal_loss(model: nn.Module) -> bool:
    """Whether the forward of the model's class computes its loss by transformers' own for causal models."""
    # accelerate's moves inputs between devices, and goes on with the class's
    replaced = "forward" in vars(model) and not hasattr(model, "_hf_hook")
    if replaced or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    try:
        source = inspect.getsource(type(model).forward)
    # of a class that was made without a file
    except (OSError, TypeError):
        return False
    return "self.loss_function(" in source and getattr(model, "loss_function", None) is ForCausalLMLoss


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: (B, S, vocabulary). labels: (B, S)."""
    return cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED)
