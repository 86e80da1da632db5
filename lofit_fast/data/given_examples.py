"""Examples as people hold them in Python: lists, data sets and frames, gone through row by row."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lofit_fast.tasks.row_files import plain_rows, unpadded

T = TypeVar("T")


@dataclass(frozen=True)
class _Unpadded:
    """A data set's rows, one at a time, with messages as they were written."""

    data: Iterable

    def __iter__(self) -> Iterator[dict]:
        return plain_rows(self.data)

    def __len__(self) -> int:
        return len(self.data)


# the library and class of a table -> its rows
TABLES: dict[tuple[str, str], Callable[[object], Iterable[dict]]] = {
    ("datasets", "Dataset"): _Unpadded,
    ("datasets", "IterableDataset"): plain_rows,
    ("pandas", "DataFrame"): lambda table: table.to_dict("records"),
    ("polars", "DataFrame"): lambda table: table.to_dicts(),
    ("pyarrow", "Table"): lambda table: [unpadded(row) for row in table.to_pylist()],
}


def at_rest(data: T) -> T | list:
    """The same data, as a list where it is a generator or another iterator, which can be gone through only once."""
    return list(data) if isinstance(data, Iterator) else data


def given_examples(data: Iterable, name: str = "the training data") -> Iterable:
    """The rows of what was given: a list, a `datasets.Dataset`, a streamed one, a generator, or a frame.

    Args:
        data: examples, or what holds them.
        name: what errors call it.

    Raises:
        TypeError: one text or path, a dict (of columns, or of splits), or what cannot be gone through.
    """
    kind = type(data)
    if table := TABLES.get((kind.__module__.partition(".")[0], kind.__name__)):
        return table(data)
    if isinstance(data, str | Path):
        raise TypeError(f"{name}: got {str(data)!r}, expected examples: read it with load_task('completion', path)")
    if isinstance(data, Mapping):
        raise TypeError(
            f"{name}: got a {kind.__name__} with the keys {list(data)[:5]}, expected a list of examples: of several "
            "splits choose one, and make rows of columns with datasets.Dataset.from_dict"
        )
    if not isinstance(data, Iterable):
        raise TypeError(f"{name}: expected a list of examples, got {kind.__name__}")
    return data
