"""From text to token ids, with labels on what is to be learned.

Prompt and completion are tokenized joined, as a model meets them in running text. The completion begins at the first
token that reaches into it. A prompt to be continued is tokenized alone, because nothing follows it yet. Most often its
tokens are how the joined ones begin, and nothing is to be decided. Where they are not ("A: " and "x" become "A", ":",
" x"), a model that continues the prompt starts from other tokens than it was trained on: a `BoundaryWarning` says so.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from tqdm.auto import tqdm

from lofit_fast.data.joined_tokens import (
    boundary_change,
    common_start,
    encode_answer,
    has_offsets,
    has_special,
    no_tokens,
    offsets,
    pairs_of,
    tokenized,
)
from lofit_fast.tasks.chat import Conversation, Rendered, check_no_template, conversation_of
from lofit_fast.tasks.task import Example, check_text

IGNORED = -100
_NO_END = "the tokenizer has no end-of-sequence token: set tokenizer.eos_token"


class BoundaryWarning(UserWarning):
    """The last tokens of a prompt are others when an answer follows than when the prompt stands alone."""


class Encoded(TypedDict):
    """One example as token ids; labels are IGNORED where nothing is to be predicted."""

    input_ids: list[int]
    labels: list[int]


def encode(tokenizer, example: Example | Mapping, max_length: int | None) -> Encoded:
    """Any example as token ids; only what is to be learned carries labels.

    Of a prompt and completion that is the completion and an end-of-sequence token. The ids are those of the joined
    text. A token that holds characters of both belongs to the completion. Where it is the very first token, nothing
    could predict it: the two texts are then tokenized apart. Both cases give a `BoundaryWarning`, and so does a
    prompt whose tokens change in front of the completion.
    Of a `Conversation`, or a mapping with "messages", the ids are those of the chat template's rendering, without
    further special tokens, and the assistant's turns are learned up to the template's own ending.
    A tokenizer without offsets (a slow one) begins the completion where the joined tokens depart from the prompt's.

    Raises ValueError for a completion without tokens, an example longer than max_length, or a tokenizer without an
    end-of-sequence token where one is to be added.
    """
    row, moved = _encoded(tokenizer, example, max_length)
    _warn([moved] if moved else [], 1)
    return row


def encode_all(
    tokenizer, examples: Sequence[Example | Mapping], max_length: int | None, *, progress: bool = False
) -> list[Encoded]:
    """`encode` of every example of a data set, with one `BoundaryWarning` for all: how many, and the first of them.

    Errors say which example they are about, counted from 1.
    """
    rows, moved = [], []
    counted = tqdm(examples, desc="tokenizing", delay=1.0, disable=not progress, leave=False)
    for number, example in enumerate(counted, start=1):
        try:
            row, where = _encoded(tokenizer, example, max_length)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"example {number}: {error}") from error
        rows.append(row)
        moved += [where] if where else []
    _warn(moved, len(rows))
    return rows


def encode_answers(
    tokenizer, questions: Iterable[tuple[str, Sequence[str]]], max_length: int | None, *, progress: bool = False
) -> list[list[Encoded]]:
    """Of questions, each a prompt and its answers: an Encoded per answer, with an end-of-sequence token.

    A `Rendered` answer has the chat template's own ending, and gets no other.
    Answers to one prompt are compared, so labels begin at the same place in all of them: see `branches`.
    Raises as `encode` does.
    """
    encoded = []
    questions = list(questions)
    counted = tqdm(questions, desc="tokenizing", delay=1.0, disable=not progress, leave=False)
    found = noted(branches(tokenizer, *_visible(*question)) for question in counted)
    for (prompt, answers), (start, endings) in zip(questions, found, strict=True):
        pairs = zip(answers, endings, strict=True)
        rows = [_labelled(closed([*start, *ending], answer, tokenizer), len(start)) for answer, ending in pairs]
        for row in rows:
            _check_length(row, max_length, prompt)
        encoded.append(rows)
    return encoded


def check_unlike(better: Sequence[int], worse: Sequence[int], where: str) -> None:
    """Raise ValueError for two answers to one prompt of the same tokens: neither can be preferred to the other.

    Texts that differ may have the same tokens: an end token that is written out, or what a tokenizer normalises.
    better, worse: token ids. where: the two, in words.
    """
    if better == worse:
        raise ValueError(f"{where} have the same tokens: expected answers that a model can tell apart")


@dataclass(frozen=True)
class Branches:
    """Token ids of several answers to one prompt: what all of them begin with, and how each goes on.

    moved: how the prompt's tokens differ from those of the prompt alone, or "".
    """

    start: list[int]
    endings: list[list[int]]
    moved: str = ""


def branches(tokenizer, prompt: str, answers: Sequence[str]) -> Branches:
    """Each answer joined to the prompt, cut where the first of them departs from the prompt.

    That is the end of the prompt's tokens, whenever they are the same in front of every answer. Where an answer changes
    them, the cut is before the change, for all answers alike: log p of the rest is then comparable.
    Raises ValueError for an answer without tokens.
    """
    pairs = pairs_of(tokenizer, prompt, answers)
    start = min(pair.start for pair in pairs)
    first = pairs[0].ids
    for pair in pairs[1:]:
        start = min(start, common_start(first, pair.ids))
    moved = next((pair.moved for pair in pairs if pair.moved), "")
    if not start:
        # nothing stands before the change, so that nothing could predict it
        alone = encode_prompt(tokenizer, prompt)
        return Branches(alone, [encode_answer(tokenizer, answer) for answer in answers], moved)
    return Branches(first[:start], [pair.ids[start:] for pair in pairs], moved)


def noted(found: Iterable[Branches]) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(start, endings) of each, with one `BoundaryWarning` for all after the last."""
    moved, count = [], 0
    for one in found:
        moved += [one.moved] if one.moved else []
        count += 1
        yield one.start, one.endings
    _warn(moved, count)


def as_example(example: Example | Mapping, tokenizer=None) -> Example:
    """An Example from a mapping with "prompt" and "completion", or with "messages", which need the tokenizer.

    Raises ValueError naming the keys it has instead, and for what is for a chat template beside texts.
    """
    if isinstance(example, Example):
        return example
    if isinstance(example, Mapping) and "messages" in example and "prompt" not in example:
        return conversation_of(example, tokenizer)
    if not isinstance(example, Mapping) or not {"prompt", "completion"} <= example.keys():
        got = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        preferences = ": preferences are trained on with fit_preferences" if "chosen" in got else ""
        raise ValueError(f"expected examples with the keys prompt and completion, or messages, got {got}{preferences}")
    check_no_template(example)
    return Example(example["prompt"], example["completion"])


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """The token ids of a prompt to be continued, with the tokenizer's special tokens unless it has them already.

    Special tokens are those that the tokenizer puts in front of a text. A `Rendered` prompt has all it needs. One that
    the tokenizer puts after a text is left out: nothing could follow it.
    Raises ValueError when there is not a single token, or half a character, TypeError for what is no string.
    """
    check_text("a prompt", prompt)
    (ids,) = tokenized(tokenizer, [prompt], has_special(prompt))
    if not ids:
        raise ValueError(f"a prompt has no tokens: {prompt!r}")
    return ids


def encode_pair(tokenizer, prompt: str, answer: str) -> list[int]:
    """The token ids of a prompt and its answer, joined, without an end-of-sequence token. Raises as `encode` does."""
    (pair,) = pairs_of(tokenizer, prompt, [answer])
    return pair.ids


def warn_of_boundaries(tokenizer, examples: Iterable[Example]) -> None:
    """One `BoundaryWarning` for all examples whose prompt is continued from other tokens than it was learned with."""
    texts = [example for example in examples if not isinstance(example, Conversation)]
    pairs = (pairs_of(tokenizer, example.prompt, [example.completion])[0] for example in texts)
    _warn([pair.moved for pair in pairs if pair.moved], len(texts))


def answer_tokens(tokenizer, example: Example) -> int:
    """How many tokens a model writes to answer with the longest of what counts as correct, its end included."""
    return 1 + max([_completion_tokens(tokenizer, example), *_other_answers(tokenizer, example)])


def _completion_tokens(tokenizer, example: Example) -> int:
    if isinstance(example, Conversation):
        ids, start = _conversation_ids(tokenizer, example), len(encode_prompt(tokenizer, example.prompt))
        return max(1, len(ids) - start)
    (pair,) = pairs_of(tokenizer, example.prompt, [example.completion])
    joined = len(pair.ids) - pair.start
    # written from other tokens than those it was joined to
    return max(joined, len(encode_answer(tokenizer, example.completion))) if pair.moved else joined


def _other_answers(tokenizer, example: Example) -> list[int]:
    """Tokens of each answer that is not the completion, written as that is: after the same white space."""
    completion = example.completion
    space = completion[: len(completion) - len(completion.lstrip())]
    texts = [space + answer.strip() for answer in example.answers if answer.strip() != completion.strip()]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def closed(ids: list[int], answer: str, tokenizer) -> list[int]:
    """An answer's ids with an end-of-sequence token, once, unless a chat template has ended it in its own way.

    Raises ValueError for a tokenizer that has none where it is needed.
    """
    if isinstance(answer, Rendered):
        return ids
    if tokenizer.eos_token_id is None:
        raise ValueError(_NO_END)
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def pad_token_id(tokenizer) -> int:
    """What fills up a batch: the padding token, or where there is none the end token. Masked either way."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _encoded(tokenizer, example, max_length: int | None) -> tuple[Encoded, str]:
    example = as_example(example, tokenizer)
    if isinstance(example, Conversation):
        row, moved = _conversation(tokenizer, example)
    else:
        (pair,) = pairs_of(tokenizer, example.prompt, [example.completion])
        row, moved = _labelled(closed(pair.ids, example.completion, tokenizer), pair.start), pair.moved
    _check_length(row, max_length, example.prompt)
    return row, moved


def _labelled(ids: list[int], start: int) -> Encoded:
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def _visible(prompt: str, answers: Sequence[str]) -> tuple[str, Sequence[str]]:
    for answer in answers:
        Example(prompt, answer)
    return prompt, answers


def _check_length(row: Encoded, max_length: int | None, prompt: str) -> None:
    length = len(row["input_ids"])
    if max_length is not None and length > max_length:
        raise ValueError(
            f"an example is {length} tokens long, the limit is {max_length} (the model's context, or max_length): "
            f"{prompt[:60]!r}..."
        )


def _conversation_ids(tokenizer, example: Conversation) -> list[int]:
    return list(tokenizer(example.text, add_special_tokens=False)["input_ids"])


def _conversation(tokenizer, example: Conversation) -> tuple[Encoded, str]:
    ids, text, moved = _conversation_ids(tokenizer, example), example.text, ""
    labels = [IGNORED] * len(ids)
    special = set(tokenizer.all_special_ids)
    spans = offsets(tokenizer, text, False) if has_offsets(tokenizer) else None
    for begin, end in example.learned:
        if spans is None:
            start, stop = (_prefix_length(tokenizer, text, ids, at) for at in (begin, end))
        else:
            inside = [i for i, (first, last) in enumerate(spans) if last > begin and first < end]
            start, stop = (inside[0], inside[-1] + 1) if inside else (0, 0)
            # special tokens cut a text, so that only what follows the last one can change
            since = next((i for i in range(start - 1, -1, -1) if ids[i] in special), 0)
            before = list(tokenizer(text[spans[since][0] : begin], add_special_tokens=False)["input_ids"])
            if ids[since:start] != before:
                moved = moved or boundary_change(tokenizer, text[:begin], text[begin:end], before, ids[since:])
        if start == stop:
            raise no_tokens(text[begin:end])
        labels[start:stop] = ids[start:stop]
    if not example.ended:
        if tokenizer.eos_token_id is None:
            raise ValueError(_NO_END)
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": labels}, moved


def _prefix_length(tokenizer, text: str, ids: list[int], end: int) -> int:
    """Of how many tokens text[:end] is, for a tokenizer without offsets."""
    before = list(tokenizer(text[:end], add_special_tokens=False)["input_ids"])
    if ids[: len(before)] != before:
        raise ValueError(_no_boundary(text, end))
    return len(before)


def _warn(moved: list[str], count: int) -> None:
    if moved:
        warnings.warn(
            f"in {len(moved)} of {count} examples the tokens at the end of the prompt change when the answer follows, "
            "so that a prompt to be continued ends in other tokens than those trained on or scored. The first: "
            f"{moved[0]}. White space at the end of a prompt belongs at the beginning of the answer.",
            BoundaryWarning,
            stacklevel=3,
        )


def _no_boundary(text: str, at: int) -> str:
    return (
        "this tokenizer gives no offsets (it is no fast one), and the tokens of the text up to "
        f"{text[max(0, at - 40) : at]!r} change with what follows: expected a fast tokenizer"
    )
