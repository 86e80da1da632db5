"""TruthfulQA (arXiv:2109.07958), read from a folder of published splits: the true answer against common errors."""

from pathlib import Path

from lofit_fast.files import given_path
from lofit_fast.tasks.published_splits import PROMPTS, check_files, subset, unlike, wording
from lofit_fast.tasks.row_files import file_rows
from lofit_fast.tasks.task import MultipleChoice, Preference, Task

SPLITS = {"train": "truthfulqa/train.csv", "validation": "truthfulqa/val.csv"}
FIELDS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
# the texts of prompts.json and the fields of each
WORDING = {
    "template": {"question"},
    "completion": {"answer"},
    "multiple_choice_prefix": set(),
    "multiple_choice_template": {"question", "answer"},
}
ANSWER = "{answer}"


def truthfulqa(data: str | Path, train_size: int | None = None, seed: int = 42, tuning_size: int | None = None) -> Task:
    """Preferences of the training questions and multiple choices of the validation questions, worded as `data` says.

    `truthfulqa/train.csv` and `truthfulqa/val.csv` have the columns `Question`, `Best Answer`, `Correct Answers` and
    `Incorrect Answers`, the last two of answers between semicolons. `prompts.json` holds, under "truthfulqa", a
    `template` ({question}) and a `completion` ({answer}) of the preferences, and of the multiple choices a
    `multiple_choice_prefix`, which comes before every question, and a `multiple_choice_template` ({question}, {answer};
    it ends with the answer, and what stands right before the answer goes with each choice when it is white space).

    Every answer ends with a full stop, as in the benchmark's own scoring, unless it ends with another sign of the end.
    Empty answers are left out, and so is one that repeats another but for case, white space or the full stop; an
    incorrect answer that is also listed as correct is not incorrect. The best answer is always among the correct.

    Args:
        data: the folder.
        train_size: keep that many training questions, drawn as for `clutrr`; None keeps all.
        seed: of what is drawn.
        tuning_size: set that many training questions aside first, and judge by them instead of those of val.csv: for
            choosing settings without looking at the validation questions.

    Raises:
        FileNotFoundError: one of the three files is not there.
        ValueError: a row without a needed field or without answers, a text of `prompts.json` that is missing or has
            other fields, no rows, or fewer rows than are asked for.
    """
    folder = given_path(data)
    check_files("truthfulqa", folder, (PROMPTS, *SPLITS.values()))
    texts = wording(folder / PROMPTS, "truthfulqa", WORDING)
    if not texts["multiple_choice_template"].endswith(ANSWER):
        raise ValueError(f"{folder / PROMPTS}: truthfulqa: multiple_choice_template must end with {ANSWER}")
    train, judged = (_questions(folder / SPLITS[split]) for split in SPLITS)
    if tuning_size is not None:
        judged = subset(train, tuning_size, seed, "truthfulqa", "tuning_size", SPLITS["train"])
        aside = {question for question, *_ in judged}
        train = [row for row in train if row[0] not in aside]
    train = subset(train, train_size, seed, "truthfulqa", "train_size", SPLITS["train"])
    return Task(
        "truthfulqa",
        [],
        [],
        preferences=tuple(_preference(texts, *row) for row in train),
        choices=tuple(_choices(texts, *row) for row in judged),
        shared_prefix=texts["multiple_choice_prefix"],
    )


def _preference(texts, question, correct, incorrect):
    chosen, *rejected = (texts["completion"].format(answer=answer) for answer in (correct[0], *incorrect))
    return Preference(texts["template"].format(question=question), chosen, tuple(rejected))


def _choices(texts, question, correct, incorrect):
    before = texts["multiple_choice_template"].removesuffix(ANSWER)
    # a space belongs to the word after it, where tokenizers put it
    prompt = before.rstrip()
    space = before[len(prompt) :]
    choices = tuple(space + answer for answer in (*correct, *incorrect))
    return MultipleChoice(prompt.format(question=question), choices, tuple(range(len(correct))), best=0)


def _questions(path):
    """(question, correct answers, the best first, incorrect answers) of every row."""
    rows = []
    for where, row in file_rows(path):
        if missing := [field for field in FIELDS if field not in row]:
            raise ValueError(f"{path}: no column {missing[0]}, got {list(row)}, expected {list(FIELDS)}")
        rows.append(_question(row, where))
    if not rows:
        raise ValueError(f"{path}: got no rows, expected at least one")
    return rows


def _question(row, where):
    for field in FIELDS:
        if not (row[field] or "").strip():
            raise ValueError(f"{where}: {field} must be a text, got {row[field]!r}")
    correct = unlike([row["Best Answer"], *row["Correct Answers"].split(";")])
    incorrect = unlike(row["Incorrect Answers"].split(";"), known=correct)
    for field, answers in (("Best Answer", correct), ("Incorrect Answers", incorrect)):
        if not answers:
            raise ValueError(f"{where}: {field} holds no answer of its own, got {row[field]!r}")
    return row["Question"].strip(), [_closed(answer) for answer in correct], [_closed(answer) for answer in incorrect]


def _closed(answer):
    return answer if answer.endswith((".", "!", "?")) else f"{answer}."
