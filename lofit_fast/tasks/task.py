"""What a task is (prompts, completions, correct answers), and the metrics every task shares."""

import random
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# a task's fields of several things -> what holds them
_HELD_AS = {"train": list, "validation": list, "candidates": tuple, "preferences": tuple, "choices": tuple}
TRAILING = " \t.,;:!?\"'\u2026\u2019\u201d"


@dataclass(frozen=True)
class Example:
    """One prompt and the text a model should continue it with.

    The two strings are joined with nothing between them, so the space or newline that separates them is part of one of
    them. `completion` carries no end-of-sequence token; whoever tokenises adds it.

    Attributes:
        prompt: what the model reads; never scored.
        completion: what it should write; holds at least one visible character.
        answers: every string counted as correct by `exact_match`, each with at least one visible character; without
            any, it becomes `(completion.strip(),)`.

    Raises:
        TypeError: a field that is not a string, or `answers` that is one string instead of several.
        ValueError: a completion or an answer of white space only, or a text with half a character in it.
    """

    prompt: str
    completion: str
    answers: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("prompt", "completion"):
            check_text(field, getattr(self, field))
        _check_visible("completion", self.completion)
        answers = _as_answers(self.answers) or (self.completion.strip(),)
        object.__setattr__(self, "answers", answers)


@dataclass(frozen=True)
class Preference:
    """A prompt, the answer to prefer, and the answers to prefer it to. All are written as an Example's are.

    An answer that is rejected twice counts once.

    Raises:
        TypeError: a field that is not a string, or `rejected` that is one string instead of several.
        ValueError: an answer of white space only, no rejected answer, or one equal to the chosen.
    """

    prompt: str
    chosen: str
    rejected: tuple[str, ...]

    def __post_init__(self):
        check_text("prompt", self.prompt)
        check_text("chosen", self.chosen)
        object.__setattr__(self, "rejected", tuple(dict.fromkeys(_as_strings(self.rejected))))
        for field, answer in (("chosen", self.chosen), *(("rejected", answer) for answer in self.rejected)):
            check_text(field, answer)
            _check_visible(field, answer)
        if not self.rejected or self.chosen in self.rejected:
            raise ValueError(f"expected rejected answers other than {self.chosen!r}, got {self.rejected}")


@dataclass(frozen=True)
class MultipleChoice:
    """A question whose answers are scored, not written: each choice goes right after the prompt.

    Attributes:
        prompt: the question in its template, without what all questions share.
        choices: every answer, leading space included.
        correct: indices of the correct ones; `best` of the one that MC1 asks for.
        ends: whether a choice is all of an answer, so that the end after it is scored too, as training on it has it.
            Otherwise a choice that is the beginning of another is never the less likely one. What a chat template has
            rendered ends in its own way, and has nothing added.

    Raises:
        ValueError: indices that are no choices, no correct or no wrong choice, a best one that is not correct.
    """

    prompt: str
    choices: tuple[str, ...]
    correct: tuple[int, ...]
    best: int
    ends: bool = False

    def __post_init__(self):
        right, every = set(self.correct), set(range(len(self.choices)))
        if not right or not right < every or self.best not in right:
            raise ValueError(f"got correct={self.correct} and best={self.best} of {len(self.choices)} choices")


@dataclass(frozen=True)
class Task:
    """Examples to train on, examples to be judged by, and the labels to choose from when there is a closed set.

    Attributes:
        name: the task's name in `TASKS`, or any other.
        train, validation: examples; either may be empty.
        candidates: the closed label set, each written exactly as a completion (leading space included), so that it can
            be scored right after a prompt; empty for open answers. One candidate may begin another (" father",
            " father-in-law"): score them with their end-of-sequence token.
        preferences: to train on instead of `train`, with DPO.
        choices: to be judged by instead of `validation`, with MC1 and MC2.
        shared_prefix: put before every prompt of `choices`, a few-shot prompt for instance.

    Raises:
        ValueError: an example whose completion is not among the candidates, when there are any.
    """

    name: str
    train: list[Example]
    validation: list[Example]
    candidates: tuple[str, ...] = ()
    preferences: tuple[Preference, ...] = ()
    choices: tuple[MultipleChoice, ...] = ()
    shared_prefix: str = ""

    def __post_init__(self):
        # of a generator nothing would be left after the first look
        for field, kind in _HELD_AS.items():
            object.__setattr__(self, field, kind(getattr(self, field)))
        if not self.candidates:
            return
        known = set(self.candidates)
        for example in (*self.train, *self.validation):
            if example.completion not in known:
                raise ValueError(
                    f"task {self.name!r}: got the completion {example.completion!r}, expected one of {self.candidates}"
                )


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether a generated text is one of the correct answers.

    Both sides are stripped, cut to as many lines as the answer has (one, as a rule: a model that goes on to invent the
    next question is not punished for it), lower-cased, freed of trailing punctuation (`. , ; : ! ?` and quotes), and
    their runs of white space become one space; an accent counts the same as a sign of its own and as part of a letter
    (NFC). A text that is punctuation only is compared as it is. Articles,
    leading punctuation and signs such as `%` or `+` are kept: they can be the answer.

    Args:
        prediction: the text generated after the prompt, without special tokens.
        answers: the correct answers, each with at least one visible character; one match is enough.

    Raises:
        TypeError: a prediction that is not a string, or one string as `answers`.
        ValueError: an answer of white space only, which every text would match.
    """
    if not isinstance(prediction, str):
        raise TypeError(f"prediction must be a string, got {type(prediction).__name__}")
    predicted = prediction.strip().splitlines()
    for answer in _as_answers(answers):
        expected = answer.strip().splitlines()
        if _normalised(predicted[: len(expected)]) == _normalised(expected):
            return True
    return False


def majority_accuracy(task: Task) -> float:
    """The share of validation examples, from 0 to 1, right when the commonest training completion is always answered.

    Among equally common ones the first seen in training is answered: this is the floor a trained model must clear.

    Raises:
        ValueError: a task without training or without validation examples.
    """
    for split in ("train", "validation"):
        if not getattr(task, split):
            raise ValueError(f"task {task.name!r} has no {split} examples, expected at least one")
    commonest = Counter(example.completion.strip() for example in task.train).most_common(1)[0][0]
    return sum(exact_match(commonest, example.answers) for example in task.validation) / len(task.validation)


def draw(count: int, size: int, seed: int) -> list[int]:
    """Draws `size` of the indices 0..count-1 without replacement; returns them ascending.

    Every index gets one number from `random.Random(seed).random()` and the smallest numbers win: the same on every
    Python version, and with one seed a smaller draw is part of every larger one.

    Raises:
        ValueError: a size that is negative or larger than count.
    """
    if not 0 <= size <= count:
        raise ValueError(f"got a size of {size}, expected one from 0 to the {count} examples there are")
    rng = random.Random(seed)
    keys = [rng.random() for _ in range(count)]
    return sorted(sorted(range(count), key=keys.__getitem__)[:size])


def _normalised(lines):
    text = " ".join(unicodedata.normalize("NFC", " ".join(lines)).lower().split())
    return text.rstrip(TRAILING) or text


def check_text(field: str, value: object) -> None:
    """Raise TypeError for what is no string, ValueError for one that no tokenizer can read."""
    if not isinstance(value, str):
        hint = ", an empty cell or null" if value is None else ""
        raise TypeError(f"{field} must be a string, got {type(value).__name__}{hint}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        around = value[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{field} holds half a character (a lone surrogate, {value[error.start]!r}), expected whole ones, as in a "
            f"text that was not cut inside an emoji: {around!r}"
        ) from error


def _check_visible(field, text):
    if not text.strip():
        raise ValueError(f"{field} must hold some text, got {text!r}")


def _as_answers(answers):
    answers = _as_strings(answers)
    for answer in answers:
        _check_visible("every answer", answer)
    return answers


def _as_strings(answers):
    if isinstance(answers, str):
        raise TypeError(f"answers must be several strings, got the one string {answers!r}")
    answers = tuple(answers)
    for answer in answers:
        if not isinstance(answer, str):
            raise TypeError(f"every answer must be a string, got {type(answer).__name__}")
    return answers
