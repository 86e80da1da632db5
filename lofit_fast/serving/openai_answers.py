"""Answers of OpenAI's protocol: whole, as events of a stream, and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DONE = "data: [DONE]\n\n"
# status -> the protocol's kind of error
_KINDS = {404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Shape:
    """How an answer is written. chat: to messages rather than a prompt. prompt_tokens: of what was asked."""

    chat: bool
    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: str, tokens: int) -> dict[str, Any]:
        """The answer in one piece."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._around(kind, [self._choice(said, finish)], usage=self._usage(tokens))

    def event(self, text: str, finish: str | None, first: bool) -> str:
        """A piece of the answer. first: whether it is the first one."""
        if self.chat:
            delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
            return _event(self._around("chat.completion.chunk", [self._choice({"delta": delta}, finish)]))
        return _event(self._around("text_completion", [self._choice({"text": text}, finish)]))

    def usage_event(self, tokens: int) -> str:
        """The count of tokens, after the last piece."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return _event(self._around(kind, [], usage=self._usage(tokens)))

    def _choice(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _around(self, kind: str, choices: list[dict], **more: Any) -> dict[str, Any]:
        name = f"chatcmpl-{self.id}" if self.chat else f"cmpl-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def error_of(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What is wrong, as the protocol says it. status: of HTTP."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_event(message: str) -> str:
    """An error in the middle of a stream."""
    return _event(error_of(message, 500))


def models_of(names: Sequence[str], created: int) -> dict[str, Any]:
    """The list of models. names: the base first, then its adapters."""
    base = names[0]
    rows = [
        {"id": name, "object": "model", "created": created, "owned_by": "lofit-fast", "root": base}
        | {"parent": None if name == base else base}
        for name in names
    ]
    return {"object": "list", "data": rows}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
