"""Tokens that come one by one, as text: whole characters, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lofit_fast.data.decode import PARTIAL, decoded, last_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenText:
    """What may be shown of an answer after each of its tokens.

    stop: strings that end the answer and are not part of it. stopped: whether one has come. before: the tokens that it
    follows.
    What could be the beginning of a stop string, or of a character, is held back until that is known.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), False
        self._ids = last_tokens(tokenizer, before)
        # the tokens from _begin to _read were decoded last: the next ones are decoded behind them, since a word's first
        # token reads differently at the beginning of a text
        self._begin, self._read = 0, len(self._ids)
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is sure after one more token."""
        self._ids.append(token)
        before = self._decode(self._begin, self._read)
        now = self._decode(self._begin, len(self._ids))
        if now.endswith(PARTIAL) or len(now) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._sure(now[len(before) :])

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._begin, self._read)
        text = self._sure(self._decode(self._begin, len(self._ids))[len(before) :])
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _decode(self, begin: int, end: int) -> str:
        return decoded(self.tokenizer, self._ids[begin:end])

    def _sure(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many signs at the end of a text begin a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
