"""Settings of transformers' generate that stand alone, whatever a model was published with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationConfig

from lofit_fast.data.decode import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of the model's own settings: tokens that its code asks for, which decide nothing about the text
_TOKENS = ("bos_token_id", "decoder_start_token_id")


class StandingAlone(GenerationConfig):
    """Settings of generate to which the model's own `generation_config` adds nothing. They say max_new_tokens.

    generate fills what is not set from the model's: sampling, penalties, suppressed tokens, a limit of time. The model
    keeps its settings all the while, since another thread may generate with them.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any) -> dict[str, Any]:
        """As transformers', but for the one call that brings the model's own settings, in which entries of any name
        are let in.
        """
        if allow_custom_entries:
            values = {name: values[name] for name in _TOKENS if name in values}
        if defaults_only:
            # beside max_new_tokens it does nothing, and generate would say so each time
            values.pop("max_length", None)
        return super().update(defaults_only, allow_custom_entries, **values)


def ends_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, endings: Iterable[str] = ()) -> set[int]:
    """The tokens that end an answer: chat models list more than one in their `generation_config`.

    endings: texts that a chat template ends turns with. Each adds its last token, where that is a special one.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return (ends | {_last_token(tokenizer, ending) for ending in endings}) - {None}


def _last_token(tokenizer: PreTrainedTokenizerBase, ending: str) -> int | None:
    ids = list(tokenizer(ending, add_special_tokens=False)["input_ids"]) if ending else []
    return ids[-1] if ids and ids[-1] in special_tokens(tokenizer) else None
