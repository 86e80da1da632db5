"""A model's folder written by whichever process of a run comes first: transformers lets process 0 alone write weights.

The others leave them out without a word, which would leave a cache without its weights.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

_ASKED = "should_save_on_this_rank"


def write_model(model: nn.Module, folder: Path) -> None:
    """`model.save_pretrained(folder)`. Raises OSError where that has written no weights."""
    own = _ASKED in vars(model)
    if hasattr(model, _ASKED) and not own:
        setattr(model, _ASKED, lambda is_main_process: is_main_process)
    try:
        model.save_pretrained(folder)
    finally:
        if _ASKED in vars(model) and not own:
            delattr(model, _ASKED)
    if not any(folder.glob("*.safetensors")):
        raise OSError(f"transformers has written no weights to {folder} in this process of several: start one process")
