"""Which attention training uses where that is left to us. A rule, for attention moves the last bits."""

from __future__ import annotations

import torch
from torch import nn

from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.pack import GROUPED
from lofit_fast.models.trials import all_logits, difference, rounding, said_of, trial_examples, trying
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.families import ARCHITECTURES
from lofit_fast.training.engine.attention_scope import UnusableAttention, attending
from lofit_fast.training.engine.cpu_extras import HAS_CPU_EXTRAS


def best_attention(model: nn.Module, device: torch.device) -> str:
    """GROUPED on a CPU, for models of the table that compute the same with it; the model's own attention elsewhere."""
    config = text_config(model)
    grouped = device.type == "cpu" and HAS_CPU_EXTRAS and config.model_type in ARCHITECTURES
    return GROUPED if grouped and attention_refusal(model, GROUPED) is None else config._attn_implementation


def check_head_counts(model: nn.Module) -> None:
    """Raise ValueError for query heads that the model's attention cannot share among the heads of keys and values."""
    config = text_config(model)
    queries, keys = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if not isinstance(queries, int) or not isinstance(keys, int) or keys < 1 or not queries % keys:
        return
    try:
        with trying(model):
            all_logits(model, CompletionCollator(0)(trial_examples(model)))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} has {queries} query heads on {keys} heads of keys and values, and cannot run: "
            f"expected a multiple of {keys}; correct num_attention_heads or num_key_value_heads of its config"
        ) from error


def attention_refusal(model: nn.Module, name: str) -> str | None:
    """Why the model cannot run with an attention, or None where its logits are those of its own attention.

    Where its own does not run, the other one has to run and give numbers.
    """
    if name == text_config(model)._attn_implementation:
        return None
    # so few tokens that attention GROUPED computes as it does in training
    batch = CompletionCollator(0, pad_to_multiple_of=1)(trial_examples(model))
    real = batch["attention_mask"].bool()
    with trying(model):
        try:
            own = all_logits(model, batch)[real]
        # without it the attention can only be tried by itself
        except Exception:
            own = None
        try:
            with attending(model, name):
                got = all_logits(model, batch)[real]
        except UnusableAttention as error:
            return str(error)
        except Exception as error:
            return f"attention {name!r} cannot be used here: {said_of(error)}"
    # eager attention makes no numbers of float64 where a window holds padding alone
    comparable = own is not None and own.isfinite().all()
    away = difference(got, own if comparable else got)
    if away <= rounding(model):
        return None
    return f"attention {name!r} cannot be used here: {type(model).__name__}'s logits are {away:.1e} away from its own"
