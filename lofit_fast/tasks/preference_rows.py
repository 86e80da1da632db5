"""Preferences of one's own: rows of prompt, chosen and rejected, as texts or as TRL's lists of messages."""

from collections.abc import Callable, Mapping

from lofit_fast.tasks.chat import check_no_template
from lofit_fast.tasks.messages import joined
from lofit_fast.tasks.task import MultipleChoice, Preference

FIELDS = ("chosen", "rejected")
EXPECTED = "expected the keys prompt, chosen and rejected"

# messages of a conversation that ends with the assistant -> (prompt, its last answer), as texts
Render = Callable[[list[dict]], tuple[str, str]]


def as_preference(row: Preference | Mapping[str, object], where: str, render: Render | None = None) -> Preference:
    """A Preference from a row.

    Texts are taken as they are; `rejected` is one text or a list of them. Of messages, `chosen` and `rejected` are
    lists of {role, content} and `rejected` may also be a list of such lists. `prompt` is then the messages before them,
    or is missing (or the text of the last question, or messages that each list begins with) where each list holds the
    whole conversation. `tools` and `chat_template_kwargs` beside them are for `render`.

    Args:
        row: with the keys above; a Preference comes back as it is.
        where: the place of the row, for errors.
        render: what makes texts of messages; None refuses messages.

    Raises:
        ValueError: a key that is missing, a value of another type or without text, a rejected answer equal to the
            chosen, what is for a chat template beside texts, or conversations that differ in more than the assistant's
            last answer.
    """
    if isinstance(row, Preference):
        return row
    if not isinstance(row, Mapping) or not row.keys() >= {*FIELDS}:
        got = f"the keys {sorted(row)}" if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where}: got {got}, {EXPECTED}")
    chosen, rejected = row["chosen"], row["rejected"]
    if is_chat := _is_chat(chosen):
        prompt, chosen, rejected = _rendered(row.get("prompt"), chosen, rejected, where, render)
    elif "prompt" not in row:
        raise ValueError(f"{where}: got the keys {sorted(row)}, {EXPECTED}")
    else:
        prompt, rejected = row["prompt"], [rejected] if isinstance(rejected, str) else rejected
    if not isinstance(rejected, list | tuple):
        raise ValueError(f"{where}: rejected must be a text or a list of texts, got {type(rejected).__name__}")
    try:
        if not is_chat:
            check_no_template(row)
        return Preference(prompt, chosen, tuple(rejected))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def as_choice(preference: Preference) -> MultipleChoice:
    """A held-out preference as a question: MC1 is right where the chosen answer scores above every rejected one.

    Answers are scored as they are trained on, with their end.
    """
    answers = (preference.chosen, *preference.rejected)
    return MultipleChoice(preference.prompt, answers, correct=(0,), best=0, ends=True)


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _rendered(prompt, chosen, rejected, where, render):
    """(prompt, chosen, rejected) as texts, of conversations that differ in their last message."""
    if render is None:
        raise ValueError(f"{where}: got messages, expected texts: load the rows with load_task and a tokenizer")
    rejected = [rejected] if _is_chat(rejected) else rejected
    if not isinstance(rejected, list) or not rejected or not all(map(_is_chat, rejected)):
        raise ValueError(f"{where}: chosen is a list of messages: rejected must be one too, or a list of such lists")
    before = prompt if _is_chat(prompt) else []
    if prompt is not None and not _is_chat(prompt) and prompt != _last_question(chosen):
        raise ValueError(f"{where}: prompt must be the messages before the answers, or the text of the last question")
    # each may hold the whole conversation too, or the last question
    talks = [joined(before, answer) for answer in (chosen, *rejected)]
    if any(talk[:-1] != talks[0][:-1] for talk in talks):
        raise ValueError(f"{where}: chosen and rejected must differ in the assistant's last message only")
    texts = [render(talk) for talk in talks]
    if len({start for start, _ in texts}) > 1:
        raise ValueError(f"{where}: the chat template makes different prompts for chosen and rejected")
    return texts[0][0], texts[0][1], [answer for _, answer in texts[1:]]


def _last_question(messages):
    return next((message.get("content") for message in reversed(messages) if message.get("role") == "user"), None)
