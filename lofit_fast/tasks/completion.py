"""Anyone's own data: prompt/completion pairs, chats or preferences, from a file, a folder or a hub data set."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from lofit_fast.tasks.chat import Conversation, Rendered, check_no_template, check_train_on, conversation_of
from lofit_fast.tasks.messages import joined
from lofit_fast.tasks.preference_rows import as_choice, as_preference
from lofit_fast.tasks.row_source import source_rows
from lofit_fast.tasks.task import Example, Preference, Task, draw

EXPECTED = "expected the keys prompt and completion, or messages, or prompt, chosen and rejected"
# what a row can be -> the columns it must have, and those that it may have
KINDS = {
    "a preference": ({"chosen", "rejected"}, {"prompt"}),
    "a completion": ({"prompt", "completion"}, set()),
    "a chat": ({"messages"}, set()),
}


def completion(
    data: str | Path,
    tokenizer=None,
    validation: str | Path | float = 0.1,
    train_size: int | None = None,
    seed: int = 42,
    split: str | None = None,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    progress: bool = False,
    train_on: str = "all",
) -> Task:
    """Rows of `prompt` and `completion`, or of chat `messages`, as a task with open answers; or preferences.

    Strings are taken as they are: no space, newline or end-of-sequence token is invented between or after them. Of a
    row of messages (a list of {role, content, ...}, the last from the assistant) the tokenizer's chat template makes a
    text, in which the assistant's turns are found: see `chat.conversation`. `tools` and `chat_template_kwargs` of a row
    go to the template too, those of a preference of messages as well; beside texts they are refused, since no template
    reads them. A chat is judged by its last turn.

    Rows of `prompt`, `chosen` and `rejected` (see `preference_rows.as_preference`) become `Task.preferences`, to be
    trained on with DPO, and those set aside become `Task.choices`: MC1 is the share of them whose chosen answer scores
    above every rejected one. The first row says which it is, and all others must agree.

    Args:
        data: a .jsonl file (one row a line), a .json file (an array, or again one row a line), a .csv or .tsv file
            with a line of column names, a .parquet file, a folder of such files or one saved by `datasets`, or a hub
            data set as "owner/name" or "owner/name:split". The hub goes through `datasets.load_dataset`; not verified
            offline.
        tokenizer: one with a chat template; only needed for messages.
        validation: a second source like `data`, or the share of `data`, from 0 up to but not including 1, to set aside
            (rounded, and at least one row unless 0). It is set aside before `train_size` is applied, so that it does
            not depend on it.
        train_size: keep that many training rows, a random subset in the order of the file (see `task.draw`); None keeps
            all.
        seed: of the share and of the random subset.
        split: of a hub data set or a folder, "train" unless said; of `data` alone.
        subset: the configuration of a hub data set; of `validation` too, where that is one.
        columns: the names above -> the names that the source has, {"prompt": "question"} for instance; of both sources.
        progress: whether a bar shows reading that takes more than a second.
        train_on: which of the assistant's turns in messages are learned, "all" or the "last".

    Raises:
        FileNotFoundError: no such file, and not a hub id either.
        ImportError: a library is missing that the source needs.
        TypeError: a source that is neither a path nor an id, or a share that is not a number.
        ValueError: anything wrong in the data (with file and line), no rows, rows of different kinds, a column that is
            not there, a share or train_size out of range, or an unknown train_on, or "last" where no row is a chat.
    """
    check_train_on(train_on)
    reading = {"subset": subset, "columns": columns, "progress": progress}
    train = _examples(data, tokenizer, train_on, split=split, **reading)
    _check_turns(data, train, train_on)
    if isinstance(validation, (str, Path)):
        held_out = _examples(validation, tokenizer, train_on, **_of_second(validation, reading))
        _check_alike(data, train, validation, held_out)
    else:
        train, held_out = _set_aside(train, validation, seed)
    if train_size is not None:
        if not 1 <= train_size <= len(train):
            raise ValueError(
                f"{data}: got train_size={train_size}, expected 1 to the {len(train)} training rows there are"
            )
        train = [train[i] for i in draw(len(train), train_size, seed)]
    if isinstance(train[0], Preference):
        return Task("preferences", [], [], preferences=tuple(train), choices=tuple(map(as_choice, held_out)))
    return Task("completion", train, held_out)


def _check_turns(data, examples, train_on):
    """Raise ValueError for turns to be chosen where no row has any."""
    if train_on == "last" and not any(isinstance(example, Conversation) for example in examples):
        held = "preferences" if isinstance(examples[0], Preference) else "prompts"
        raise ValueError(
            f"{data}: got train_on='last', which is of rows with messages, but it holds {held}, of which the answers "
            "are learned: expected 'all'"
        )


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


def _of_second(validation, reading):
    """How the second source is read: a file beside a hub data set has no subset."""
    return {**reading, "subset": None} if Path(validation).exists() else reading


def _check_alike(data, train, validation, held_out):
    kinds = ["preferences" if isinstance(rows[0], Preference) else "completions" for rows in (train, held_out)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{data} holds {kinds[0]} and {validation} holds {kinds[1]}, expected the same of both")


def _examples(source, tokenizer, train_on, **reading):
    named = set(reading["columns"] or ())
    examples, first = [], None
    for where, row in source_rows(source, **reading):
        kind = _kind(row, where, named)
        preference = kind == "a preference"
        if first is None:
            first = preference, where
        if preference != first[0]:
            raise ValueError(
                f"{where}: got {_told(preference)}, but {first[1]} holds {_told(first[0])}: expected one of the two in "
                "all rows"
            )
        if preference:
            examples.append(as_preference(row, where, partial(_last_turn, row=row, where=where, tokenizer=tokenizer)))
        else:
            examples.append(_example(row, kind, where, tokenizer, train_on))
    if not examples:
        raise ValueError(f"{source}: got no rows, expected at least one")
    return examples


def _told(preference):
    return "a preference (chosen, rejected)" if preference else "an answer to learn (completion or messages)"


def _kind(row, where, named):
    """Which of `KINDS` a row is. named: names that were given columns, which the kind must have a use for."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: got {type(row).__name__}, {EXPECTED}")
    kinds = [kind for kind, (needed, more) in KINDS.items() if needed <= row.keys() and named <= needed | more]
    if not kinds:
        raise ValueError(f"{where}: got the keys {sorted(row)}, {EXPECTED}{_hint(named)}")
    if len(kinds) > 1:
        # of sets that were put together, rows have the other kind's columns too, and nothing in them
        filled = {name for name, value in row.items() if value is not None}
        kinds = [kind for kind in kinds if KINDS[kind][0] <= filled] or kinds
    if len(kinds) > 1:
        raise ValueError(
            f"{where}: got the keys {sorted(row)}, which are {' and '.join(kinds)}: choose by naming a column of one, "
            "with --columns chosen=chosen, completion=completion or messages=messages"
        )
    return kinds[0]


def _hint(named):
    return f" (columns were given for {', '.join(sorted(named))})" if named else "; --columns renames"


def _example(row, kind, where, tokenizer, train_on):
    try:
        if kind == "a chat":
            return conversation_of(row, tokenizer, train_on)
        prompt, answer = row["prompt"], row["completion"]
        # a prompt and a completion of messages, as TRL has them, are one chat
        if isinstance(prompt, list) and isinstance(answer, list):
            return conversation_of({**row, "messages": joined(prompt, answer)}, tokenizer, train_on)
        check_no_template(row)
        return Example(prompt, answer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _last_turn(messages, row, where, tokenizer):
    """(prompt, answer) of a conversation as texts, the answer with the template's ending where it has one.

    row: where the messages come from, with what else the template is to read.
    """
    try:
        talk = conversation_of({**row, "messages": messages}, tokenizer, "last")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    answer = talk.text[len(talk.prompt) : talk.learned[-1][1]]
    return talk.prompt, Rendered(answer) if talk.ended else answer
