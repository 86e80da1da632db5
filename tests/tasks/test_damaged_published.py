"""Damaged files of published tasks: the task, or one sentence that names the file."""

import json

import pytest

from lofit_fast.tasks import load_task
from tests.damaging import damaged, revalued
from tests.tasks import test_clutrr, test_mquake, test_truthfulqa

# task -> (what writes its folder, the files in it that are damaged, those of JSON rows)
TASKS = {
    "mquake": (test_mquake, ("prompts.json", "mquake/train.jsonl")),
    "truthfulqa": (test_truthfulqa, ("prompts.json", "truthfulqa/train.csv")),
    "clutrr": (test_clutrr, ("prompts.json", "clutrr/train.json")),
}
# the library that reads it takes a while
COUNTS = {"clutrr": 6}


def read_or_refused(name, folder):
    try:
        assert load_task(name, folder).name == name
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), error
        assert not isinstance(error, UnicodeError | RecursionError)


@pytest.mark.parametrize("name", TASKS)
def test_a_damaged_file_is_read_or_refused(name, tmp_path, monkeypatch):
    if name == "clutrr":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    module, files = TASKS[name]
    module.write(tmp_path)
    for file in files:
        sound = (tmp_path / file).read_bytes()
        for content in damaged(sound, COUNTS.get(name, 40), seed=3):
            (tmp_path / file).write_bytes(content)
            read_or_refused(name, tmp_path)
        (tmp_path / file).write_bytes(sound)


@pytest.mark.parametrize("name", ["mquake", "truthfulqa"])
def test_another_value_in_the_wording_is_refused(name, tmp_path):
    module, _ = TASKS[name]
    module.write(tmp_path)
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    for content in revalued(prompts, 40):
        (tmp_path / "prompts.json").write_text(json.dumps(content))
        read_or_refused(name, tmp_path)


def test_another_value_in_a_row_is_refused(tmp_path):
    test_mquake.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "mquake" / "train.jsonl").read_text().splitlines()]
    for content in revalued(rows, 60):
        (tmp_path / "mquake" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        read_or_refused("mquake", tmp_path)


def test_a_query_that_no_parser_takes(tmp_path):
    pytest.importorskip("datasets")
    for query in ("(" * 10**5, "-" * 10**5 + "1", "\0", "{[]: 1}"):
        test_clutrr.write(tmp_path, train=[{**test_clutrr.TRAIN[0], "query": query}])
        with pytest.raises(ValueError, match="row 1: query must be two names"):
            load_task("clutrr", tmp_path)


@pytest.mark.parametrize("name", ["triviaqa", "mmlu"])
def test_questions_of_other_values_are_refused(name, tmp_path):
    rows = {
        "triviaqa": [{"question": "a?", "answers": ["b", "c"]}],
        "mmlu": [{"question": "a?", "choices": ["b", "c"], "answer": 1, "subject": "d"}],
    }[name]
    path = tmp_path / "a.jsonl"
    for content in revalued(rows, 60):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        read_or_refused(name, path)
