"""Requests of OpenAI's protocol, checked: what is asked for is done, or refused with the reason.

A parameter that would change the answer there and is not supported here is refused, unless its value changes nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lofit_fast.config import shown
from lofit_fast.files import each_once

# parameters of the protocol -> the values that change nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    # of completions 0 asks for the likelihoods of what was drawn
    "logprobs": (False,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_LEAST_TEMPERATURE, _MOST_STOPS, _LONGEST_STOP = 0.01, 16, 1000


class BadRequestError(ValueError):
    """A request that is refused. param: which part of it is wrong. code: the protocol's word for why."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """include_usage: whether a last event counts the tokens."""

    include_usage: bool = False


class _Asked(_Strict):
    """What requests of both kinds have. Numbers in their ranges; `None` is as if it were not there."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("expected an object of parameters by name")
        return {name: value for name, value in given.items() if not _changes_nothing(name, value)}

    @field_validator("temperature")
    @classmethod
    def _drawable(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < _LEAST_TEMPERATURE:
            raise ValueError(f"expected 0, for the likeliest tokens, or at least {_LEAST_TEMPERATURE}")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        listed = [value] if isinstance(value, str) else value or []
        if len(listed) > _MOST_STOPS or not all(0 < len(one) <= _LONGEST_STOP for one in listed):
            raise ValueError(f"expected up to {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters")
        return value

    @model_validator(mode="after")
    def _nothing_idle(self) -> _Asked:
        if self.temperature == 0 and self.top_p not in (None, 1):
            raise ValueError("top_p does nothing with temperature 0: leave one of them out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def longest(self) -> int | None:
        """The most tokens that were asked for."""
        return self.max_tokens


class CompletionRequest(_Asked):
    """POST /v1/completions: a prompt to be continued."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]

    @property
    def text(self) -> str:
        """The one prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(_Asked):
    """POST /v1/chat/completions: messages to be answered."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one thing: leave one of them out")
        return self

    @property
    def longest(self) -> int | None:
        """The most tokens that were asked for."""
        return self.max_tokens or self.max_completion_tokens


_Kind = TypeVar("_Kind", CompletionRequest, ChatRequest)


def parsed(kind: type[_Kind], body: bytes) -> _Kind:
    """A request of a kind. Raises BadRequestError for what is no JSON, and for what is asked for and cannot be done."""
    try:
        given = json.loads(body, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is no JSON: {error}") from error
    try:
        return kind.model_validate(given)
    except (ValidationError, RecursionError) as error:
        raise _refusal(error) from error


def _changes_nothing(name: str, value: Any) -> bool:
    # in Python False is 0, and True is 1
    same = any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ())
    )
    return value is None or same


def _refusal(error: ValidationError | RecursionError) -> BadRequestError:
    if isinstance(error, RecursionError):
        return BadRequestError("the body is nested too deeply")
    found = error.errors(include_url=False)
    # of what may be a string or a list, what is wrong with the one that it is
    first = next(
        (one for one in found if not (one["type"] == "string_type" and isinstance(one["input"], list))), found[0]
    )
    place = ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained-")) and part != "str"
    )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "not supported here, and so refused rather than passed over"
    got = "" if first["type"] in ("missing", "extra_forbidden", "value_error") else f", got {shown(first['input'])}"
    return BadRequestError(f"{place}: {message}{got}" if place else f"{message}{got}", place or None)
