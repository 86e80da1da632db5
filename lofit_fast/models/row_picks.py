"""Attention that picks the tokens it looks at in a whole row, whatever the row holds."""

from __future__ import annotations

from torch import nn

from lofit_fast.patching.architectures import text_config

# what configs call how many tokens an attention picks in a whole row: it picks those of other examples in rows longer
# than that alone, which a trial's row is not
_BY_ROW = ("index_topk", "index_topk_blocks", "indexer_budget")


def picks_in_rows(model: nn.Module) -> str | None:
    """What the config calls the number of tokens that attention picks in a whole row; None where it looks at all."""
    settings = vars(text_config(model))
    return next((name for name in _BY_ROW if settings.get(name)), None)
