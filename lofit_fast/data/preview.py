"""An encoded example as text again, with what is learned told from what is only read."""

from dataclasses import dataclass
from itertools import groupby

from lofit_fast.data.decode import continuation
from lofit_fast.data.encode import IGNORED, Encoded

OPEN, CLOSE = "[[", "]]"


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens that are all learned, or all only read. tokens: how many they are."""

    text: str
    learned: bool
    tokens: int


def preview(tokenizer, row: Encoded) -> list[Part]:
    """An example's parts in their order, special tokens included: joined, their texts are what the model reads.

    A character of several tokens that lie on both sides of a border is shown by each side as far as it goes.
    """
    parts, start = [], 0
    for learned, labels in groupby(row["labels"], key=lambda label: label != IGNORED):
        end = start + len(list(labels))
        text = continuation(tokenizer, row["input_ids"][:start], row["input_ids"][start:end], special=True)
        parts.append(Part(text, learned, end - start))
        start = end
    return parts


def marked(parts: list[Part], room: int | None = None) -> str:
    """The parts as one text, learned ones in [[double brackets]].

    room: characters of a part that are shown; of a longer one the middle is left out, and how much that is stands there
    instead. None shows all.
    """
    texts = [_shortened(part.text, room) for part in parts]
    return "".join(f"{OPEN}{text}{CLOSE}" if part.learned else text for part, text in zip(parts, texts, strict=True))


def _shortened(text, room):
    if room is None or len(text) <= room:
        return text
    head, tail = text[: room - room // 3], text[len(text) - room // 3 :]
    return f"{head} ...({len(text) - len(head) - len(tail)} characters)... {tail}"
