"""Damaged files of rows: rows that are right, or one sentence that names the file; never anything else."""

import json

import pytest

from lofit_fast.tasks import load_task
from lofit_fast.tasks.task import Example, Preference
from tests.damaging import VALUES, damaged, revalued
from tests.tasks.row_writers import write

PAIRS = [{"prompt": f"{a}é=", "completion": a * 2} for a in "abcdefgh"]
CHATS = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a}]} for a in "abcd"]
CHOICES = [{"prompt": f"{a}?", "chosen": a, "rejected": ["x", "y"]} for a in "abcd"]
# type of file -> (rows, how many damaged ones are read here, and how many in all)
KINDS = {
    ".jsonl": (PAIRS, 30, 2000),
    ".json": (CHOICES, 30, 2000),
    ".csv": (PAIRS, 30, 2000),
    ".tsv": (PAIRS, 10, 2000),
    ".parquet": (PAIRS, 20, 2000),
}


def read_or_refused(path):
    """Whether a file was read; then what it holds can be trained on."""
    try:
        task = load_task("completion", path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error) or "validation: a share of 0.1 leaves none" in str(error), error
        assert not isinstance(error, UnicodeError | RecursionError)
        return False
    assert all(isinstance(row, Example) for row in task.train + task.validation)
    assert all(isinstance(row, Preference) for row in task.preferences)
    for row in task.train:
        row.prompt.encode()
    return True


def read_all(tmp_path, suffix, count, seed):
    rows, *_ = KINDS[suffix]
    content = write(tmp_path / f"sound{suffix}", rows).read_bytes()
    path = tmp_path / f"damaged{suffix}"
    for one in damaged(content, count, seed):
        path.write_bytes(one)
        read_or_refused(path)


@pytest.mark.parametrize("suffix", KINDS)
def test_a_damaged_file_is_read_or_refused(tmp_path, suffix):
    read_all(tmp_path, suffix, KINDS[suffix][1], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", KINDS)
def test_many_damaged_files_are_read_or_refused(tmp_path, suffix):
    read_all(tmp_path, suffix, KINDS[suffix][2], seed=2)


@pytest.mark.parametrize("rows", [PAIRS, CHATS, CHOICES], ids=["pairs", "chats", "choices"])
def test_another_value_anywhere_is_read_or_refused(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    for one in revalued(rows, 30):
        path.write_text("".join(json.dumps(row) + "\n" for row in one))
        read_or_refused(path)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_row_of_another_kind_is_refused(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps(value) + "\n")
    assert not read_or_refused(path)
