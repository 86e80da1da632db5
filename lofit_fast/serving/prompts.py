"""What is asked, as token ids, and how the answer is drawn: checked before it waits in the queue."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING

from torch import nn

from lofit_fast.config import shown
from lofit_fast.data.decode import special_tokens
from lofit_fast.data.encode import encode_prompt
from lofit_fast.evaluation.generation_settings import ends_of
from lofit_fast.models.vocabulary import check_ids
from lofit_fast.patching.architectures import text_config
from lofit_fast.serving.answer_queue import Sampling
from lofit_fast.serving.openai_requests import BadRequestError, ChatRequest, CompletionRequest
from lofit_fast.tasks.chat import Rendered, turn_endings
from lofit_fast.tasks.messages import check_none_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOO_LONG = "context_length_exceeded"


class Prompts:
    """The prompts of one model. new_tokens: of an answer that does not say how many, where there is room for them."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        # a fast tokenizer cannot be used by two threads at once: the one that answers has the other
        self.tokenizer = copy.deepcopy(tokenizer)
        self.context = getattr(text_config(model), "max_position_embeddings", None)
        self._lock = threading.Lock()
        # an adapter that was trained on chats ends its turns as the template does
        self._chat_ends = frozenset(ends_of(model, self.tokenizer, turn_endings(self.tokenizer)))

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def of_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages as the chat template renders them, with what comes before an answer. Raises BadRequestError."""
        if not self.chats:
            raise BadRequestError("this model has no chat template: use /v1/completions", "messages")
        try:
            with self._lock:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # templates raise errors of Jinja's, and what Python raises inside them
        except Exception as error:
            raise BadRequestError(f"the model's chat template refuses the messages: {error}", "messages") from error
        try:
            check_none_left_out(messages, text)
        except ValueError as error:
            raise BadRequestError(str(error), "messages") from error
        return self._encoded(Rendered(text), "messages")

    def of_text(self, text: str) -> list[int]:
        """A text to be continued. Raises BadRequestError."""
        return self._encoded(text, "prompt")

    def sampling(self, asked: CompletionRequest | ChatRequest, ids: list[int]) -> Sampling:
        """How a request wants its answer drawn. Raises BadRequestError where that does not fit behind the prompt."""
        room = None if self.context is None else self.context - len(ids)
        if room is not None and (asked.longest or 1) > room:
            raise BadRequestError(
                f"a prompt of {len(ids)} tokens and an answer of {asked.longest or 1} do not fit the model's context "
                f"of {self.context}",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
                _TOO_LONG,
            )
        most = asked.longest or min(self.new_tokens, room if room is not None else self.new_tokens)
        stop, ends = self._stops(asked.stops)
        if isinstance(asked, ChatRequest):
            ends |= self._chat_ends
        drawn = {"temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed}
        given = {key: value for key, value in drawn.items() if value is not None}
        return Sampling(most, stop=stop, ends=ends, **given)

    def _stops(self, stops: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[int]]:
        """Stop strings as texts, and as tokens where they name special ones, which no text shows."""
        with self._lock:
            special, unknown = special_tokens(self.tokenizer), self.tokenizer.unk_token_id
            # white space around it has no part in a token
            read = {stop: self.tokenizer(stop.strip() or stop, add_special_tokens=False)["input_ids"] for stop in stops}
        # a sign that the tokenizer does not know names no token
        meant = {stop: special.keys() - (set() if special.get(unknown, "") in stop else {unknown}) for stop in stops}
        named = {stop: ids for stop, ids in read.items() if not meant[stop].isdisjoint(ids)}
        if mixed := [stop for stop, ids in named.items() if len(ids) > 1]:
            raise BadRequestError(
                f"{shown(mixed[0])} holds a special token, which no answer's text shows: expected one special token "
                "alone, or a text without any",
                "stop",
            )
        return tuple(stop for stop in stops if stop not in named), frozenset(ids[0] for ids in named.values())

    def _encoded(self, text: str, param: str) -> list[int]:
        try:
            with self._lock:
                ids = encode_prompt(self.tokenizer, text)
            check_ids(self.model, [ids], "prompt")
        except ValueError as error:
            raise BadRequestError(str(error), param) from error
        return ids
