"""What a training is called with: refused by name where it is of another kind, before anything is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn
from transformers import TrainerCallback

from lofit_fast.config import GivenHeads, Head, LofitConfig, Recipe, shown
from lofit_fast.training.engine import Engine


def check_given(model: object, tokenizer: object, recipe: object, engine: object) -> None:
    """Raise TypeError for what is no model, tokenizer, Recipe or Engine (or None).

    Raises ValueError for a model that no gradient passes, since it was made in inference mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {shown(model)}: lofit_fast.load_model loads one by name")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model was made under torch.inference_mode(), so nothing trains through it: load it outside"
        )
    if not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(f"expected the model's tokenizer, got {shown(tokenizer)}")
    for name, value, kind in (("recipe", recipe, Recipe), ("engine", engine, Engine)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"expected {name} to be a lofit_fast.{kind.__name__}, or None, got {shown(value)}")


def given_callbacks(callbacks: Iterable[TrainerCallback]) -> tuple[TrainerCallback, ...]:
    """The callbacks that a training is given, gone through once: a generator would have none left for a second look.

    Raises TypeError for anything but a list, or another iterable, of callbacks; for one callback without a list too.
    """
    if not isinstance(callbacks, Iterable):
        hint = f": write callbacks=[{_name(callbacks)}]" if _is_callback(callbacks) else ""
        raise TypeError(f"expected callbacks to be a list of TrainerCallback, got {shown(callbacks)}{hint}")
    listed = tuple(callbacks)
    for one in listed:
        if not _is_callback(one):
            raise TypeError(f"expected callbacks to be a list of TrainerCallback, got one with {shown(one)} in it")
    return listed


def _is_callback(one: object) -> bool:
    # transformers makes one of a class
    return isinstance(one, TrainerCallback) or (isinstance(one, type) and issubclass(one, TrainerCallback))


def _name(callback: object) -> str:
    return callback.__name__ if isinstance(callback, type) else f"{type(callback).__name__}(...)"


def given_heads(heads: GivenHeads) -> tuple[Head, ...] | Literal["all"] | None:
    """The heads that a training is told to tune, as plain pairs, or "all"; None for those that step 1 chooses.

    Raises ValueError / TypeError for anything but different pairs of non-negative integers.
    """
    if isinstance(heads, str) and heads != "all":
        expected = "'all', a list of (layer, head), or None for step 1 to choose"
        raise TypeError(f"expected heads to be {expected}, got {heads!r}")
    return None if heads is None else LofitConfig(offset=heads).offset
