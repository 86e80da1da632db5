"""CLUTRR, the family relations benchmark, read from a folder of its published splits."""

import ast
from collections.abc import Mapping
from pathlib import Path

from lofit_fast.files import given_path
from lofit_fast.tasks.published_splits import PROMPTS, check_files, naming_rows, subset, wording
from lofit_fast.tasks.row_files import file_rows
from lofit_fast.tasks.task import Example, Task

SPLITS = {"train": "clutrr/train.json", "validation": "clutrr/val.json"}
FIELDS = ("clean_story", "query", "target_text")
# the texts of prompts.json and the fields of each; a template that held the relation would give the answer away
WORDING = {"template": {"story", "first", "second"}, "completion": {"relation"}}


def clutrr(data: str | Path, train_size: int | None = None, seed: int = 42) -> Task:
    """The CLUTRR splits in `data`, in the wording that `data` gives.

    `clutrr/train.json` and `clutrr/val.json` are JSON arrays of rows with `clean_story` (names in square brackets,
    which are removed), `query` ("('first', 'second')") and `target_text` (what second is to first). `prompts.json`
    holds, under "clutrr", a `template` with the fields {story}, {first} and {second} and a `completion` with the field
    {relation}. `candidates` are the completions that
    occur in either whole file, in alphabetical order.

    Args:
        data: the folder.
        train_size: keep that many training rows, a random subset in the order of the file (see `task.draw`: a smaller
            subset is part of a larger one of the same seed); None keeps all. Validation is never cut.
        seed: of the subset.

    Raises:
        FileNotFoundError: one of the three files is not there.
        ValueError: a file that is not JSON, a row without a needed field, a text of `prompts.json` that is missing or
            has other fields, no rows, or fewer rows than train_size.
    """
    folder = given_path(data)
    check_files("clutrr", folder, (PROMPTS, *SPLITS.values()))
    texts = wording(folder / PROMPTS, "clutrr", WORDING)
    splits = {split: _examples(folder / name, texts) for split, name in SPLITS.items()}
    labels = {example.completion for examples in splits.values() for example in examples}
    train = subset(splits["train"], train_size, seed, "clutrr", "train_size", SPLITS["train"])
    return Task("clutrr", train, splits["validation"], tuple(sorted(labels)))


def _examples(path, texts):
    examples = []
    for where, row in file_rows(path):
        story, relation = _text(row, "clean_story", where), _text(row, "target_text", where)
        first, second = _query(_text(row, "query", where), where)
        story = story.replace("[", "").replace("]", "")
        with naming_rows(where):
            prompt = texts["template"].format(story=story, first=first, second=second)
            examples.append(Example(prompt, texts["completion"].format(relation=relation), (relation,)))
    if not examples:
        raise ValueError(f"{path}: got no rows, expected at least one")
    return examples


def _text(row, field, where):
    if not isinstance(row, Mapping) or field not in row:
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where}: no field {field}, got {got}, expected {list(FIELDS)}")
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field} must be a text, got {value!r}")
    return value


def _query(text, where):
    try:
        query = ast.literal_eval(text)
    # what is nested too deeply is too much for the parser
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        query = None
    if not isinstance(query, tuple) or [type(name) for name in query] != [str, str]:
        raise ValueError(f"{where}: query must be two names as in \"('A', 'B')\", got {text!r}")
    return query
