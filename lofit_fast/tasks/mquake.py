"""MQuAKE (arXiv:2305.14795), read from a folder of published splits: what follows from an edited fact."""

from pathlib import Path

from lofit_fast.files import given_path
from lofit_fast.tasks.published_splits import PROMPTS, check_files, naming_rows, subset, unlike, wording
from lofit_fast.tasks.row_files import file_rows
from lofit_fast.tasks.task import Example, Task

SPLITS = {"train": "mquake/train.jsonl", "validation": "mquake/val.jsonl"}
# the texts of prompts.json and the fields of each; a template that held the answer would give it away
WORDING = {"template": {"edit", "question"}, "completion": {"answer"}}
SUBJECT = "{}"


def mquake(data: str | Path, train_size: int | None = None, seed: int = 42) -> Task:
    """The MQuAKE splits in `data`, in the wording that `data` gives: an edited fact, a question, and an open answer.

    `mquake/train.jsonl` and `mquake/val.jsonl` hold one row a line with `requested_rewrite` (a list; of its first item
    {prompt, subject, target_new: {str}} the prompt's {} is the subject, and the new target follows it), `questions`
    (the first is asked), `new_answer`, and `new_answer_alias` (a list, may be missing): the answer and its aliases all
    count as correct. `prompts.json` holds, under "mquake", a `template` with the fields {edit} and {question} and a
    `completion` with the field {answer}.

    Args:
        data: the folder.
        train_size: keep that many training rows, drawn as for `clutrr`; None keeps all. Validation is never cut.
        seed: of the subset.

    Raises:
        FileNotFoundError: one of the three files is not there.
        ValueError: a file that is not JSON, a row without a needed field, a text of `prompts.json` that is missing or
            has other fields, no rows, or fewer rows than train_size.
    """
    folder = given_path(data)
    check_files("mquake", folder, (PROMPTS, *SPLITS.values()))
    texts = wording(folder / PROMPTS, "mquake", WORDING)
    train, validation = (_examples(folder / name, texts) for name in SPLITS.values())
    return Task("mquake", subset(train, train_size, seed, "mquake", "train_size", SPLITS["train"]), validation)


def _examples(path, texts):
    examples = [_example(row, where, texts) for where, row in file_rows(path)]
    if not examples:
        raise ValueError(f"{path}: got no rows, expected at least one")
    return examples


def _example(row, where, texts):
    try:
        rewrite, question, answer = row["requested_rewrite"][0], row["questions"][0], row["new_answer"]
        fact, subject, target = rewrite["prompt"], rewrite["subject"], rewrite["target_new"]["str"]
        aliases = row.get("new_answer_alias", [])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: expected requested_rewrite[0] with prompt, subject and target_new.str, questions[0] and "
            f"new_answer, missing: {error}"
        ) from error
    needed = {"prompt": fact, "subject": subject, "target_new.str": target, "questions[0]": question}
    for name, value in (needed | {"new_answer": answer}).items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {name} must be a text, got {value!r}")
    if fact.count(SUBJECT) != 1:
        raise ValueError(f"{where}: prompt must hold one {SUBJECT} for the subject, got {fact!r}")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError(f"{where}: new_answer_alias must be a list of texts, got {aliases!r}")
    answers = unlike([answer, *aliases])
    edit = f"{fact.replace(SUBJECT, subject)} {target}"
    with naming_rows(where):
        prompt = texts["template"].format(edit=edit, question=question.strip())
        return Example(prompt, texts["completion"].format(answer=answers[0]), tuple(answers))
