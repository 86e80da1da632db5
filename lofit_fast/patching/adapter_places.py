"""Folders that an adapter must not be written into: somebody else's adapter, or a model, would be lost by it."""

from __future__ import annotations

from pathlib import Path

from lofit_fast.config import shown
from lofit_fast.files import read_json

# what a folder with a model in it has; one of these beside an adapter_config.json is taken for a part of that adapter
_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)


def check_place(folder: Path, config_file: str, kind: str) -> None:
    """Raise ValueError for a folder with a model, or with an adapter of another kind, in it.

    config_file: the name of an adapter's config. kind: how the "peft_type" of ours begins. What is no whole JSON is no
    adapter that anybody could load, and may be replaced.
    """
    check_no_model(folder)
    try:
        theirs = read_json(folder / config_file)
    except (OSError, ValueError):
        return
    found = theirs.get("peft_type") if isinstance(theirs, dict) else None
    if found is not None and not str(found).startswith(kind):
        raise ValueError(
            f"{folder} holds an adapter of another kind ({shown(found)}), which would be lost: choose another folder"
        )


def check_no_model(folder: Path) -> None:
    """Raise ValueError for a folder with the weights of a model in it."""
    if weights := sorted(path.name for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds a model ({weights[0]}), which stock code would no longer load beside an adapter: choose "
            "another folder"
        )
