"""Conversations: a chat template renders all messages as one text, and the assistant's turns are found in it.

A template is a program. It may trim a message, move the thinking out of earlier turns, or end the last turn in another
way than the ones before. So nothing is put together here: the text is the template's own rendering of the whole, and a
turn is what stands in it after the prompt that the template would give a model to answer. Where there is no such place,
the conversation is refused.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lofit_fast.tasks.messages import LAST, after_thinking, check_messages, check_none_left_out
from lofit_fast.tasks.task import Example

TRAIN_ON = ("all", "last")
# what a row may have beside its messages, for the template
FOR_TEMPLATE = ("tools", "chat_template_kwargs")
_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# what looks like one token, whether the tokenizer knows it as special or not
_TAG = r"<[^<>\s]+>|\[/?[A-Z_]+\]"
_WORD = "ANSWER"


class Rendered(str):
    """A text that a chat template has made: it has every special token it needs, so tokenizers are to add none."""

    __slots__ = ()


@dataclass(frozen=True)
class Conversation(Example):
    """A rendered chat, whose last turn is the completion of all that stands before it.

    Attributes:
        prompt: the rendering of all messages but the last, with what the template puts before an answer.
        completion: the last turn as rendered, thinking and calls of tools included, without its ending.
        answers: the last message's content, without thinking in front of it, and the completion.
        text: the rendering of all messages. It begins with prompt + completion.
        learned: the assistant's turns to learn, each with its ending, as (begin, end) of `text`.
        ended: whether the template ends the last turn. If not, whoever tokenizes adds an end-of-sequence token.
        marker: what the template writes between the thinking and the content ("</think>"), or "".
    """

    text: str = ""
    learned: tuple[tuple[int, int], ...] = ()
    ended: bool = True
    marker: str = ""

    @property
    def ending(self) -> str:
        """What the template ends the last turn with ("<|im_end|>"), or ""."""
        # two endings on two lines are one of the turn and one of the text
        return next(iter(self.text[len(self.prompt) + len(self.completion) : self.learned[-1][1]].split()), "")

    def said(self, written: str) -> str:
        """The content of an answer that a model wrote, special tokens included: after the thinking, before the end."""
        content = written.rpartition(self.marker)[2] if self.marker else written
        return content.partition(self.ending)[0] if self.ending else content


def conversation_of(row: Mapping, tokenizer, train_on: str = "all") -> Conversation:
    """A row with "messages", and perhaps "tools" and "chat_template_kwargs". See `conversation`."""
    return conversation(
        row["messages"],
        tokenizer,
        tools=row.get("tools"),
        train_on=train_on,
        options=row.get("chat_template_kwargs"),
    )


def conversation(
    messages: Sequence[Mapping],
    tokenizer,
    *,
    tools: Sequence | None = None,
    train_on: str = "all",
    options: Mapping | None = None,
) -> Conversation:
    """Messages as one text, with the assistant's turns found in it.

    Where the template marks them itself ({% generation %}), its marks are taken, but for what the prompt holds already.
    Elsewhere a turn begins where the rendering of the messages before it ends, with what the template puts before an
    answer, and it ends with the template's own ending. What follows an ending, a line break say, is not learned.
    A template without endings leaves the end of the last turn to the tokenizer's end-of-sequence token.

    Args:
        messages: mappings with a role and a content, the last from the assistant. A content may be missing beside
            other fields, such as tool_calls. All fields go to the template as they are.
        tokenizer: one with a chat template.
        tools: passed to the template.
        train_on: "all" of the assistant's turns, or the "last". Some templates change earlier turns (they take the
            thinking out), so that "all" is refused.
        options: further variables of the template, enable_thinking for instance.

    Raises:
        ValueError: messages that are no conversation, a tokenizer without a template, a template that refuses them, or
            a turn that cannot be found. The message names the turn.
    """
    check_train_on(train_on)
    check_messages(messages, train_on)
    if not isinstance(options, Mapping | None):
        raise ValueError(f"chat_template_kwargs must map names of variables to values, got {options!r}")
    if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)):
        raise ValueError(f"tools must be a list of tools, got {type(tools).__name__}: {str(tools)[:60]!r}")
    template = _Template(tokenizer, tools, options)
    messages = [dict(message) for message in messages]
    text, prompt = template.render(messages), template.render(messages[:-1], prompt=True)
    last = len(messages) - 1
    check_none_left_out(messages, text)
    if not text.startswith(prompt):
        raise ValueError(_no_prefix(messages, last, prompt, text))
    if template.marks:
        learned = _marked(template, messages, text, prompt, train_on)
    else:
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and (train_on == "all" or i == last)]
        learned = [_turn(template, messages, i, text, prompt) for i in wanted]
    closed, ended = _last_ending(template, text[: learned[-1][1]], len(prompt))
    if not ended:
        # the end token that is to follow comes after all of the text
        closed, learned[-1] = len(text), (learned[-1][0], len(text))
    completion = text[len(prompt) : closed].rstrip() if ended else text[len(prompt) : closed]
    content = after_thinking(messages[-1].get("content") or "", prompt)
    answers = tuple(dict.fromkeys(answer for answer in (content.strip(), completion.strip()) if answer))
    return Conversation(
        Rendered(prompt),
        completion,
        answers,
        text=text,
        learned=tuple(learned),
        ended=ended,
        marker=_marker(completion, content.strip()),
    )


def turn_endings(tokenizer) -> tuple[str, ...]:
    """What a tokenizer's chat template ends a turn of the assistant with, each as one text without white space.

    Nothing without a template, and of one that takes no short talk.
    """
    try:
        talk = conversation(
            [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": _WORD}], tokenizer
        )
    except ValueError:
        return ()
    return (talk.ending,) if talk.ending else ()


def check_no_template(row: Mapping) -> None:
    """Raise ValueError for a row of texts with a value in `FOR_TEMPLATE`, which would change nothing there."""
    if given := [name for name in FOR_TEMPLATE if row.get(name)]:
        raise ValueError(
            f"got {' and '.join(given)} beside texts: a chat template reads them, and texts go through none; expected "
            "messages, or the row without them"
        )


def check_train_on(train_on: str) -> None:
    """Raise ValueError unless it is one of `TRAIN_ON`."""
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on: got {train_on!r}, expected {' or '.join(TRAIN_ON)}")


@dataclass(frozen=True)
class _Known:
    """What is the same for all conversations: special tokens, what cuts a text into them, endings by variables."""

    special: list[str]
    piece: re.Pattern
    endings: dict[str, tuple[str, str]]


# some tokenizers have thousands of special tokens, and rows come by the thousand too
@functools.lru_cache(maxsize=4)
def _known(tokenizer, source, size: int) -> _Known:
    """source, size: the template and the number of tokens, so that a changed tokenizer is looked at again."""
    special = [t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special]
    special.sort(key=len, reverse=True)
    return _Known(special, re.compile("|".join([*map(re.escape, special), _TAG, r"[\s\S]"])), {})


class _Template:
    """A tokenizer's chat template with its variables.

    marks: whether it says itself what the assistant writes. ending: how it ends a turn that another message follows.
    final: how it ends the last turn; it may begin with `ending` (Phi) or not (gpt-oss). Either may be "".
    """

    def __init__(self, tokenizer, tools, options) -> None:
        # a tokenizer without a template has the attribute, and it is None
        if tokenizer is None or not getattr(tokenizer, "chat_template", "unknown"):
            got = "no tokenizer" if tokenizer is None else "one without"
            raise ValueError(f"messages need a tokenizer with a chat template, got {got}")
        self.tokenizer = tokenizer
        self.options = dict(options or {}) | ({"tools": list(tools)} if tools else {})
        source = getattr(tokenizer, "chat_template", "")
        if isinstance(source, Mapping):
            source = tokenizer.get_chat_template(None, self.options.get("tools"))
        self.source = source
        self.marks = isinstance(source, str) and _BLOCK.search(source) is not None
        known = _known(tokenizer, source, len(tokenizer) if hasattr(tokenizer, "__len__") else 0)
        self.special, self._piece = known.special, known.piece
        variables = repr(sorted(self.options.items()))
        if variables not in known.endings:
            known.endings[variables] = self._endings()
        self.ending, self.final = known.endings[variables]

    def render(self, messages: Sequence[Mapping], prompt: bool = False) -> str:
        """The text of some messages. prompt: with what comes before an answer. Raises ValueError if it refuses them."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **self.options
            )
        # templates raise whatever they like
        except Exception as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def blocks(self, messages: Sequence[Mapping], text: str) -> list[tuple[int, int]]:
        """What the template itself says the assistant writes, as (begin, end) of the text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # what return_assistant_tokens_mask is made of: in characters, because the step to tokens stops without a word
        # at a block that begins with a space
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        (rendered,), (found,) = render_jinja_template(
            conversations=[messages],
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.options},
        )
        return [tuple(block) for block in found if block[0] < block[1]] if rendered == text else []

    def same(self, first: str, second: str) -> int:
        """How many characters two texts begin with alike, without half a special token."""
        if second.startswith(first):
            return len(first)
        at = 0
        for a, b in zip(self._piece.finditer(first), self._piece.finditer(second), strict=False):
            if a.group() != b.group():
                break
            at = a.end()
        return at

    def first_tag(self, text: str) -> str:
        """The special token that a text begins with, or ""."""
        piece = self._piece.match(text)
        return piece.group() if piece and len(piece.group()) > 1 else ""

    def _endings(self) -> tuple[str, str]:
        short = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": _WORD}]
        try:
            final = self.render(short).rpartition(_WORD)[2]
            followed = self.render([*short, {"role": "user", "content": "NEXT"}]).rpartition(_WORD)[2]
        # one that takes no such conversation: what ends a text is its ending, then
        except ValueError:
            return "", ""
        ending = final[: self.same(final, followed)].rstrip()
        if not ending and final.strip():
            # the last turn ends in a way of its own
            ending = self.first_tag(followed.lstrip())
        return ending, final.rstrip()


def _turn(template: _Template, messages: list[Mapping], i: int, text: str, last: str) -> tuple[int, int]:
    """Where message i stands in the whole text: after the prompt for it, up to its ending. last: the last prompt."""
    prompt = last if i == len(messages) - 1 else _prompt_of(template, messages, i)
    if prompt is None or not text.startswith(prompt):
        raise ValueError(_no_prefix(messages, i, prompt, text))
    if i == len(messages) - 1:
        return len(prompt), _end_of_text(template, text)
    alone = template.render(messages[: i + 1])
    same = template.same(alone, text)
    body = len(alone.rstrip())
    if same < body and template.final and alone.rstrip().endswith(template.final):
        # as the last message it ended in another way
        body -= len(template.final)
    if same < body or body < len(prompt):
        raise ValueError(
            f"{_name(i)} reads {alone[len(prompt) :][:60]!r} when it is the last message, and "
            f"{text[len(prompt) :][:60]!r} in the whole conversation: the chat template changes earlier turns, so they "
            f"cannot be learned as they are written; {LAST}"
        )
    end = len(alone.rstrip()) if same >= len(alone.rstrip()) else body
    if end == body and template.ending and text.startswith(template.ending, body):
        end = body + len(template.ending)
    return len(prompt), end


def _marked(template: _Template, messages: list[Mapping], text: str, prompt: str, train_on: str) -> list:
    """The template's own marks, without what the prompts hold, and with the endings it left out."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    blocks = template.blocks(messages, text)
    if len(blocks) < len(turns):
        raise ValueError(
            f"the chat template marks {len(blocks)} turns of the assistant ({{% generation %}}), expected {len(turns)}"
        )
    begins = [prompt]
    if train_on == "all":
        prompts = [_prompt_of(template, messages, i) for i in turns[:-1]]
        begins += [p for p in prompts if p is not None and text.startswith(p)]
    learned = []
    for begin, end in blocks:
        if train_on == "last" and end <= len(prompt):
            continue
        begin = max([begin, *(len(p) for p in begins if begin < len(p) < end)])
        # a model that learns no ending would never stop
        end += next((len(e) for e in (template.ending, template.final) if e and text.startswith(e, end)), 0)
        learned.append((begin, end))
    if not learned or learned[-1][1] <= len(prompt):
        raise ValueError(f"the chat template marks nothing ({{% generation %}}) in {_name(len(messages) - 1)}")
    return learned


def _prompt_of(template: _Template, messages: list[Mapping], i: int) -> str | None:
    """What a model is given to write message i; None where the template has no prompt for it."""
    try:
        return template.render(messages[:i], prompt=True)
    except ValueError:
        return None


def _end_of_text(template: _Template, text: str) -> int:
    """Where the last turn ends, ending included."""
    end = len(text.rstrip())
    if template.final and template.final.startswith(template.ending) and text[:end].endswith(template.final):
        # what only closes the text is no ending of a turn
        end -= len(template.final) - len(template.ending)
    return end


def _last_ending(template: _Template, text: str, begin: int) -> tuple[int, bool]:
    """(where the ending of the text's last turn begins, whether there is one). begin: of the turn."""
    text = text.rstrip()
    endings = [e for e in (template.final, template.ending) if e and text.endswith(e)]
    # a call of a tool may end in another way
    endings += [token for token in template.special if text.endswith(token)]
    return (max(begin, len(text) - len(endings[0])), True) if endings else (len(text), False)


def _marker(completion: str, content: str) -> str:
    """The tag right before the content, where something precedes it."""
    lead = completion[: completion.rfind(content)] if content and content in completion else ""
    tags = re.findall(_TAG, lead)
    return tags[-1] if tags and lead.rstrip().endswith(tags[-1]) else ""


def _name(i: int) -> str:
    return f"message {i + 1} (assistant)"


def _no_prefix(messages: list[Mapping], i: int, prompt: str | None, text: str) -> str:
    if prompt is None:
        return f"{_name(i)} cannot be found: the chat template refuses to prompt for it after {i} messages; {LAST}"
    at = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    return (
        f"{_name(i)} cannot be found: the chat template's prompt for it is no beginning of the whole conversation: "
        f"after {text[max(0, at - 30) : at]!r} it has {prompt[at : at + 40]!r}, the whole {text[at : at + 40]!r}. "
        + ("Give " if i == len(messages) - 1 else f"Either {LAST}, or give ")
        + "what the template expects (the thinking of a reasoning model), its variables (chat_template_kwargs), or "
        "another template"
    )
