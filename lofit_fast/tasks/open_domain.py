"""What a model knew before it was edited, 0-shot: TriviaQA, NQ-open and MMLU, to judge by and never to train on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from lofit_fast.extras import needing
from lofit_fast.files import given_path
from lofit_fast.tasks.published_splits import naming_rows, subset, unlike
from lofit_fast.tasks.row_files import file_rows
from lofit_fast.tasks.task import Example, MultipleChoice, Task, check_text

# data set, configuration, split: the answers of TriviaQA's test questions are not public
HUB = {
    "triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    "nq_open": ("google-research-datasets/nq_open", "nq_open", "validation"),
    "mmlu": ("cais/mmlu", "all", "test"),
}
OPEN_PROMPT = "Q: {question}\nA:"
CHOICE_PROMPT = "The following are multiple choice questions (with answers){about}.\n\n{question}\n{options}\nAnswer:"
LETTERS = "ABCDEFGHIJ"


def triviaqa(data: str | Path | None = None, validation_size: int | None = None, seed: int = 42) -> Task:
    """TriviaQA without its documents: exact match with any of a question's answers.

    Args:
        data: None for the hub's data set (validation split, through `datasets`; not verified offline), or a file of a
            type in `row_files.READERS`, or a folder with triviaqa.jsonl, of rows {"question": text, "answers": [text,
            ...]}. In a cell of CSV a list is written as in JSON.
        validation_size: keep that many questions, drawn from the seed; None keeps all.
        seed: of that draw.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that is not as above, no rows, or fewer than validation_size.
    """
    return _open("triviaqa", data, validation_size, seed)


def nq_open(data: str | Path | None = None, validation_size: int | None = None, seed: int = 42) -> Task:
    """Natural Questions, open: exact match with any of a question's answers. As `triviaqa` in all else."""
    return _open("nq_open", data, validation_size, seed)


def mmlu(data: str | Path | None = None, validation_size: int | None = None, seed: int = 42) -> Task:
    """MMLU, 0-shot: the letter of one of the listed options, scored and not written; MC1 is the accuracy.

    As `triviaqa`, with rows {"question": text, "choices": [text, ...], "answer": index from 0, "subject": text}; the
    subject may be missing. From the hub it is the test split.
    """
    rows = _rows("mmlu", data)
    questions = subset([_choice(row, where) for where, row in rows], validation_size, seed, *_named("mmlu", data))
    return Task("mmlu", [], [], choices=tuple(questions))


def _open(name, data, size, seed):
    examples = [_example(row, where) for where, row in _rows(name, data)]
    return Task(name, [], subset(examples, size, seed, *_named(name, data)))


def _named(name, data):
    return name, "validation_size", HUB[name][0] if data is None else data


def _rows(name, data):
    rows = hub_rows(name) if data is None else list(file_rows(_file(name, given_path(data))))
    if not rows:
        raise ValueError(f"{name}: {data or HUB[name][0]}: got no rows, expected at least one")
    return rows


def _file(name, path):
    return path / f"{name}.jsonl" if path.is_dir() else path


def hub_rows(name):
    """The questions of a data set of `HUB`, as its rows, from the hub or its cache."""
    # the library takes seconds to import: only for those who use it
    with needing("datasets", "train", f"{name} from the hub"):
        from datasets import load_dataset

    source, configuration, split = HUB[name]
    rows = load_dataset(source, configuration, split=split)
    return [(f"{source}:{split}: row {number}", _LOCAL[name](row)) for number, row in enumerate(rows, start=1)]


# from a row of the hub to one of the local format
_LOCAL: dict[str, Callable[[Mapping], dict]] = {
    "triviaqa": lambda row: {
        "question": row["question"],
        "answers": [row["answer"]["value"], *row["answer"]["aliases"]],
    },
    "nq_open": lambda row: {"question": row["question"], "answers": row["answer"]},
    "mmlu": dict,
}


def _example(row, where):
    question, answers = _texts(row, where, "answers")
    answers = unlike(answers)
    if not answers:
        raise ValueError(f"{where}: expected an answer, got {row['answers']!r}")
    with naming_rows(where):
        return Example(OPEN_PROMPT.format(question=question), f" {answers[0]}", tuple(answers))


def _choice(row, where):
    question, choices = _texts(row, where, "choices")
    answer, subject = row.get("answer"), row.get("subject") or ""
    # a cell of CSV is a text
    answer = int(answer) if isinstance(answer, str) and answer.isdecimal() else answer
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: expected 2 to {len(LETTERS)} choices, got {len(choices)}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer must be the index of one of {len(choices)} choices, got {answer!r}")
    if not isinstance(subject, str):
        raise ValueError(f"{where}: subject must be a text, got {subject!r}")
    options = "\n".join(f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False))
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    prompt = CHOICE_PROMPT.format(about=about, question=question, options=options)
    return MultipleChoice(prompt, tuple(f" {letter}" for letter in LETTERS[: len(choices)]), (answer,), answer)


def _texts(row, where, several):
    if not isinstance(row, Mapping) or not {"question", several} <= row.keys():
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where}: got {got}, expected the keys question and {several}")
    question, texts = row["question"], _listed(row[several])
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: question must be a text, got {question!r}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {several} must be a list of texts, got {texts!r}")
    with naming_rows(where):
        for text in (question, *texts):
            check_text(several, text)
    return question.strip(), texts


def _listed(value):
    """The list that a cell of CSV holds as JSON; anything else as it is."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) else value
