"""Files of rows, of every type that a data set may have."""

import csv
import json

import pytest


def write(path, rows, encoding="utf-8"):
    """A file of rows, of the type that its name says."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", encoding=encoding, newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding=encoding)
    return path
