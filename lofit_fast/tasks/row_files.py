"""Rows of a file, one at a time: JSON, CSV and Parquet, each with the place of the row for errors."""

import csv
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from lofit_fast.extras import needing
from lofit_fast.files import each_once

# characters in a cell of CSV: a whole document may stand in one
LONGEST_CELL = 2**31 - 1
# csv has one limit for all readers of a process, whose turn it is to be read
_LIMIT = threading.Lock()
# rows that are held at a time
PARQUET_BATCH = 256

Rows = Iterator[tuple[str, object]]


def file_rows(path: Path) -> Rows:
    """Pairs of (where, row) of a file of a type in `READERS`, read as they are asked for.

    where: file and line or row, for errors. A row of JSON is whatever stands there; one of CSV or Parquet is a dict by
    column, with None for an empty cell. Of CSV, every other cell is a string as it stands between the separators.
    Raises FileNotFoundError, ImportError (Parquet without pyarrow) or ValueError: a folder, a file that is not there,
    a pipe or a device, a file of another type, not UTF-8, or not what its name says.
    """
    path = Path(path)
    known = ", ".join(READERS)
    if path.is_dir():
        raise ValueError(f"{path}: got a folder, expected one of type {known}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, expected one of type {known}")
    if not path.is_file():
        raise ValueError(f"{path}: got a pipe or a device, expected a file of type {known}")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: got a file of type {path.suffix or 'unknown'}, expected one of type {known}")
    return READERS[path.suffix.lower()](path)


def is_row_file(path: Path) -> bool:
    """Whether a name ends as that of a file of rows does."""
    return path.suffix.lower() in READERS


def unpadded(row: Mapping[str, object]) -> dict[str, object]:
    """A row of Arrow (Parquet, `datasets`) with its messages as they were written.

    Arrow gives every message of a column the keys of all others, with null where a message had none. To a chat
    template a key that is there is another thing than one that is not. A content of null stays: people write it.
    """
    return {name: _dense(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def plain_rows(data: Iterable) -> Iterator[dict[str, object]]:
    """Rows as plain data, of a data set of `datasets` whatever format it was set to give ("arrow", "pandas", ...).

    Its choice of columns stays, and so does a transform of the user's own.
    """
    # streamed ones have a format too, of all columns, and do not say so
    chosen = getattr(data, "format", {})
    if hasattr(data, "with_format") and chosen.get("type") != "custom":
        columns = {name: chosen[name] for name in ("columns", "output_all_columns") if name in chosen}
        data = data.with_format(None, **columns)
    return map(unpadded, data)


def _dense(value):
    if isinstance(value, list):
        return [_dense(item) for item in value]
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items() if item is not None or key == "content"}
    return value


def _json_rows(path: Path) -> Rows:
    """An array of rows, or one row a line."""
    try:
        # no other line end: separators such as U+2028 may stand in a JSON string
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            first = True
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if first and line.lstrip().startswith("["):
                    rows = _parsed(line + file.read(), path, number)
                    yield from ((f"{path}: row {place}", row) for place, row in enumerate(rows, start=1))
                    return
                first = False
                yield f"{path}: line {number}", _parsed(line.removesuffix("\n"), path, number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error


def _parsed(text, path, line):
    try:
        return json.loads(text, object_pairs_hook=each_once)
    except json.JSONDecodeError as error:
        at = f"{path}: line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{at}: expected JSON, got what is not: {error.msg}") from error
    # a number of thousands of digits, or two values under one name
    except ValueError as error:
        raise ValueError(f"{path}: line {line}: expected JSON, got what cannot be read: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: line {line}: got JSON that is nested too deeply, expected a row") from error


def _csv_rows(path: Path, delimiter: str) -> Rows:
    """A line of column names, then rows; cells in quotes may hold separators and line ends."""
    reader = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            rows = _with_long_cells(reader)
            header = [name.strip() for name in next(rows, [])]
            _check_header(header, path, delimiter)
            number, begins = 0, reader.line_num + 1
            for cells in rows:
                # an empty line is no row
                if cells:
                    number += 1
                    where = f"{path}: row {number}, line {begins}"
                    if len(cells) != len(header):
                        raise ValueError(f"{where}: got {len(cells)} cells, expected {len(header)}: {header}")
                    yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
                begins = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: expected CSV, got what is not: {error}") from error


def _with_long_cells(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The lines of a reader of csv. Between two of them its limit is as it was: others read, and set it, meanwhile."""
    while True:
        with _LIMIT:
            limit = csv.field_size_limit(LONGEST_CELL)
            try:
                cells = next(reader, None)
            finally:
                csv.field_size_limit(limit)
        if cells is None:
            return
        yield cells


def _check_header(header, path, delimiter):
    if not any(header):
        raise ValueError(f"{path}: got no column names, expected them in the first line")
    other = next((sign for sign in (";", "\t", ",", "|") if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        raise ValueError(
            f"{path}: got one column, {header[0]!r}, expected {delimiter!r} between columns, not {other!r}"
        )
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ValueError(f"{path}: got the column {twice[0]!r} more than once, expected names that differ: {header}")


def _parquet_rows(path: Path) -> Rows:
    with needing("pyarrow", "train", f"{path}: Parquet"):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=PARQUET_BATCH)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path}: row {number}", unpadded(row)) for number, row in enumerate(rows, start=1))
    # what is damaged may end anywhere in the library: in its own errors, in text that is none, in dates there are not
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{path}: expected Parquet, got what is not: {error}") from error


# how a file's name ends -> its rows. Another type is one row here.
READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}
