"""Messages of a chat before a template has made a text of them: what they must be, and what in them is thinking."""

import re
from collections.abc import Mapping, Sequence

# thinking that is written into a content, in front of what is said
_THINKING = re.compile(r"\s*(?:<(think|thinking|thought|reasoning)>.*?</\1>|\[THINK\].*?\[/THINK\])\s*", re.DOTALL)
# what turns thinking on or off in a message, which templates take out
_SWITCH = re.compile(r"/(?:no_)?think\b")
# what other trainers take for a turn that is not learned
_WEIGHTS = ("weight", "train", "training")
LAST = 'learn the last turn only (train_on="last", --train-on last)'


def check_messages(messages, train_on: str) -> None:
    """Raise ValueError for what is no conversation that ends with the assistant, or has turns that are not to count."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) < 2:
        raise ValueError(f"messages must be a list of two or more, got {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not _has_text(message):
            raise ValueError(f"every message must hold the texts role and content, got {message!r}")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be from the assistant, got {messages[-1]['role']!r}")
    learned = messages if train_on == "all" else messages[-1:]
    for message, key in ((m, key) for m in learned if m["role"] == "assistant" for key in _WEIGHTS):
        if message.get(key) not in (None, 1):
            raise ValueError(
                f"got a turn with {key}={message[key]!r}, which no template reads: it would be learned too. "
                "Expected none; " + LAST + ", or put the turns into rows of their own"
            )


def _has_text(message: Mapping) -> bool:
    """A content, or something else instead: calls of tools, or thinking."""
    content = message.get("content")
    others = any(value for key, value in message.items() if key not in ("role", "content", "name"))
    return isinstance(content, str) or (content is None and others)


def joined(before: Sequence[Mapping], after: Sequence[Mapping]) -> list[Mapping]:
    """Messages, and those that follow: what both hold, the end of the one and the beginning of the other, once."""
    for count in range(min(len(before), len(after) - 1), 0, -1):
        if list(map(_said_by, before[-count:])) == list(map(_said_by, after[:count])):
            return [*before, *after[count:]]
    return [*before, *after]


def _said_by(message: Mapping) -> tuple[object, object]:
    content = message.get("content")
    return message.get("role"), content.strip() if isinstance(content, str) else content


def check_none_left_out(messages: Sequence[Mapping], text: str) -> None:
    """Raise ValueError for a content that the template has left out, as those do that expect it in parts."""
    for i, message in enumerate(messages):
        said = _SWITCH.sub("", _THINKING.sub("", message.get("content") or "", count=1)).strip()
        lines = said.splitlines() or [""]
        # what comes after the thinking, which may be moved or left out
        end = lines[-1].rpartition(">")[2].strip() or lines[-1].strip()
        # what a tool says may be quoted, and what goes with a call of one moved
        if message["role"] != "tool" and not message.get("tool_calls") and end not in text:
            raise ValueError(
                f"message {i + 1} ({message['role']}): the chat template leaves its content out ({end[:40]!r}): "
                "expected a template that takes this role, and contents that are texts"
            )


def after_thinking(content: str, prompt: str) -> str:
    """A content without the thinking in front of it, as most data of reasoning models has it."""
    thinking = _THINKING.match(content)
    after = content[thinking.end() :] if thinking else ""
    if prompt.rstrip().endswith("<think>"):
        # which the template has opened
        after = after or content.partition("</think>")[2]
    return after.strip() or content
