"""Reading what published tasks are made of: folders of given files, wording from prompts.json, subsets."""

import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lofit_fast.tasks.task import draw

PROMPTS = "prompts.json"


def check_files(task: str, folder: Path, names: Sequence[str]) -> None:
    """Raise FileNotFoundError, naming the folder and all that it should hold, for the first file that is missing."""
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{task}: no file {name} in {folder}, expected a folder with {', '.join(names)}")


def wording(path: Path, task: str, expected: Mapping[str, set[str]]) -> dict[str, str]:
    """The task's texts in prompts.json. expected: per text the {fields} it must have, all of them and no other.

    A template with a field too many might give the answer away. Raises ValueError for a file that is not JSON, or a
    text that is missing or has other fields.
    """
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))[task]
        found = {name: texts[name] for name in expected}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got what is not: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected {' and '.join(expected)} under the key {task}, missing: {error}") from error
    for name, fields in expected.items():
        try:
            got = {field for _, field, _, _ in string.Formatter().parse(found[name]) if field is not None}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {task}: {name} must be a text with fields, got {found[name]!r}") from error
        if got != fields:
            raise ValueError(f"{path}: {task}: {name} has the fields {sorted(got)}, expected {sorted(fields)}")
    return found


@contextmanager
def naming_rows(where: str) -> Iterator[None]:
    """A scope in which what is wrong with the texts of a row is a ValueError that begins with its place."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def subset(items: Sequence, size: int | None, seed: int, task: str, option: str, of: object) -> list:
    """`size` of the items, drawn from the seed, in their order (see `task.draw`); None keeps all.

    task, option, of: whose size it is, what it is called and what it is taken from, for the error.
    Raises ValueError for a size below 1 or above what there is.
    """
    if size is None:
        return list(items)
    if not 1 <= size <= len(items):
        raise ValueError(f"{task}: got {option}={size}, expected 1 to {len(items)}, the rows in {of}")
    return [items[i] for i in draw(len(items), size, seed)]


def unlike(answers: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """The answers without white space around them, empty ones, and those said before or among the known ones.

    Two answers are the same when they differ in case, white space or a full stop at the end only.
    """
    seen = {_folded(answer) for answer in known}
    kept = []
    for answer in map(str.strip, answers):
        if _folded(answer) and _folded(answer) not in seen:
            seen.add(_folded(answer))
            kept.append(answer)
    return kept


def _folded(answer: str) -> str:
    return " ".join(answer.casefold().split()).rstrip(". ")
