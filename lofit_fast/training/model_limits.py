"""What a model must have to be trained on text, and how long that may be."""

from __future__ import annotations

from torch import nn

from lofit_fast.models.row_index import output_head
from lofit_fast.patching.architectures import text_config


def check_language_model(model: nn.Module) -> None:
    """Raise ValueError for a model that predicts no tokens: it has no output over the vocabulary."""
    if output_head(model) is None:
        raise ValueError(
            f"expected a language model, got {type(model).__name__}, which has no output over the vocabulary: load it "
            "with AutoModelForCausalLM. To train a classifier, patch it and use any Trainer"
        )


def token_limit(model: nn.Module, max_length: int | None) -> int | None:
    """The longest example in tokens: the smaller of max_length and the model's context; None where neither is known."""
    context = getattr(text_config(model), "max_position_embeddings", None)
    return min((n for n in (max_length, context) if n is not None), default=None)
