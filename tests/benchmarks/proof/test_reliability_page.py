"""The page of what was tried is what the results give, and says what it should."""

import json
from pathlib import Path

import pytest

from benchmarks.proof.reliability.reliability_page import ITEMS, NEEDED, PAGE, RESULTS, page, records
from benchmarks.proof.reliability.tested_rows import ROWS
from tests.markdown_tables import cells_of

ROOT = Path(__file__).parents[3]
ROW = {
    "item": 2,
    "what": "damaged adapters",
    "tried": 12345,
    "failed": 2,
    "named": ["adapter: gives <another> result | in silence (2 times)"],
    "command": "python -m nothing",
    "seconds": 60,
    "processor": "some",
    "commit": "0123",
    "counts": {"adapter": {"tried": 12345, "failed": 2}},
    "figures": {"slope": -7},
}


def test_the_page_is_the_results():
    assert (ROOT / PAGE).read_text() == page(records(ROOT / RESULTS))


def test_every_item_has_its_rows_and_every_number_its_file():
    rows = records(ROOT / RESULTS)
    shown = cells_of((ROOT / PAGE).read_text())[1:]
    assert len(shown) == len(rows)
    for cells, row in zip(shown, rows.values(), strict=True):
        assert cells[0] == f"{row['item']}. {ITEMS[row['item']]}"
        assert [int(cell.replace(",", "")) for cell in cells[2:4]] == [row["tried"], row["failed"]]
        # what failed is said
        assert bool(row["named"]) == bool(row["failed"])


def test_rows_of_tests_are_of_tests_that_are_there():
    files = [file for row in ROWS.values() for file in row.tests]
    assert files and [file for file in files if not (ROOT / file).is_file()] == []
    assert {row.item for row in ROWS.values()} <= ITEMS.keys()


def test_a_row_that_lacks_something_is_refused(tmp_path):
    for key in NEEDED:
        (tmp_path / "one.json").write_text(json.dumps({k: v for k, v in ROW.items() if k != key}))
        with pytest.raises(ValueError, match=f"lacks {key}"):
            records(tmp_path)


def test_what_failed_and_what_was_not_tried_are_named():
    text = page({"corrupt": ROW})
    assert "| 2. Corrupt anything | damaged adapters | 12,345 | 2 | `python -m nothing` |" in text
    assert "* Corrupt anything: adapter: gives &lt;another> result \\| in silence (2 times)" in text
    assert "Not recorded yet: 1. Kill anywhere; 3. Threads;" in text
    assert "| 2. Corrupt anything | slope | -7 |" in text
