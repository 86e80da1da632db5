"""Anyone's own data: prompt/completion pairs or chats, from a JSON file or a hub data set."""

import re
from pathlib import Path

from lofit_fast.tasks.chat import conversation_of
from lofit_fast.tasks.source import SUFFIXES, json_rows
from lofit_fast.tasks.task import Example, Task, draw

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<split>\S+))?")
EXPECTED = "expected the keys prompt and completion, or messages"


def completion(
    data: str | Path,
    tokenizer=None,
    validation: str | Path | float = 0.1,
    train_size: int | None = None,
    seed: int = 42,
    train_on: str = "all",
) -> Task:
    """Rows of `prompt` and `completion`, or of chat `messages`, as a task with open answers.

    Strings are taken as they are: no space, newline or end-of-sequence token is invented between or after them. Of a
    row of messages (a list of {role, content, ...}, the last from the assistant) the tokenizer's chat template makes a
    text, in which the assistant's turns are found: see `chat.conversation`. `tools` and `chat_template_kwargs` of such
    a row go to the template too. It is judged by its last turn.

    Args:
        data: a .jsonl file (one row a line), a .json file (an array, or again one row a line), or a hub data set as
            "owner/name" or "owner/name:split" (split "train" unless said). The hub goes through
            `datasets.load_dataset`; not verified offline.
        tokenizer: one with a chat template; only needed for messages.
        validation: a second source like `data`, or the share of `data`, from 0 up to but not including 1, to set aside
            (rounded, and at least one row unless 0). It is set aside before `train_size` is applied, so that it does
            not depend on it.
        train_size: keep that many training rows, a random subset in the order of the file (see `task.draw`); None keeps
            all.
        seed: of the share and of the subset.
        train_on: which of the assistant's turns are learned, "all" or the "last".

    Raises:
        FileNotFoundError: no such file, and not a hub id either.
        TypeError: a source that is neither a path nor an id, or a share that is not a number.
        ValueError: anything wrong in the data (with file and line), no rows, or a share or train_size out of range.
    """
    train = _examples(data, tokenizer, train_on)
    if isinstance(validation, (str, Path)):
        held_out = _examples(validation, tokenizer, train_on)
    else:
        train, held_out = _set_aside(train, validation, seed)
    if train_size is not None:
        if not 1 <= train_size <= len(train):
            raise ValueError(
                f"{data}: got train_size={train_size}, expected 1 to the {len(train)} training rows there are"
            )
        train = [train[i] for i in draw(len(train), train_size, seed)]
    return Task("completion", train, held_out)


def _set_aside(examples, share, seed):
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"validation must be a path, a data set id or a share, got {type(share).__name__}")
    if not 0 <= share < 1:
        raise ValueError(f"validation: got a share of {share}, expected 0 <= share < 1")
    size = max(1, round(share * len(examples))) if share else 0
    if size >= len(examples):
        raise ValueError(
            f"validation: a share of {share} leaves none of {len(examples)} rows to train on, expected some"
        )
    chosen = set(draw(len(examples), size, seed))
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


def _examples(source, tokenizer, train_on):
    examples = [_example(row, where, tokenizer, train_on) for where, row in _rows(source)]
    if not examples:
        raise ValueError(f"{source}: got no rows, expected at least one")
    return examples


def _rows(source):
    """Pairs of (where, row): `where` names file and line, or data set and row, for errors."""
    if not isinstance(source, (str, Path)):
        raise TypeError(f"data must be a path or a data set id, got {type(source).__name__}")
    path = Path(source)
    if path.exists() or path.suffix in SUFFIXES or isinstance(source, Path):
        return json_rows(path)
    hub = HUB_ID.fullmatch(source)
    if hub is None:
        raise FileNotFoundError(f"{source}: no such file, and not a data set id such as owner/name")
    return _hub_rows(hub["id"], hub["split"] or "train")


def _hub_rows(name, split):
    # the library takes seconds to import: only for those who use it
    from datasets import load_dataset

    rows = load_dataset(name, split=split)
    return [(f"{name}:{split}: row {number}", row) for number, row in enumerate(rows, start=1)]


def _example(row, where, tokenizer, train_on):
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {type(row).__name__}, {EXPECTED}")
    if not {"prompt", "completion"} <= row.keys() and "messages" not in row:
        raise ValueError(f"{where}: got the keys {sorted(row)}, {EXPECTED}")
    try:
        if {"prompt", "completion"} <= row.keys():
            return Example(row["prompt"], row["completion"])
        return conversation_of(row, tokenizer, train_on)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
