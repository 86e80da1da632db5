import json
import sys
from types import SimpleNamespace

import pytest

from lofit_fast.tasks import load_task
from lofit_fast.tasks.open_domain import HUB, mmlu, nq_open, triviaqa

OPEN = [{"question": f" Who is {i}? ", "answers": ["Ann", "ann.", "", f"A. {i}"]} for i in range(6)]
CHOICES = [
    {"question": f"{i} + 1 is", "choices": [str(i), f"{i + 1} ", "none"], "answer": 1, "subject": "small_numbers"}
    for i in range(6)
]
# the hub's rows that stand for the first of those above, as its pages show them
ON_HUB = {
    "triviaqa": {"question": "Who is 0?", "answer": {"value": "Ann", "aliases": ["A. 0"], "type": "x"}},
    "nq_open": {"question": "Who is 0?", "answer": ["Ann", "A. 0"]},
    "mmlu": CHOICES[0],
}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["triviaqa", "nq_open"])
def test_open_questions(tmp_path, name):
    path = lines(tmp_path / f"{name}.jsonl", OPEN)
    task = load_task(name, data=path)
    # a folder holds a file of the task's name
    assert task == load_task(name, data=tmp_path)
    assert (task.name, task.train, len(task.validation)) == (name, [], 6)
    first = task.validation[0]
    assert (first.prompt, first.completion, first.answers) == ("Q: Who is 0?\nA:", " Ann", ("Ann", "A. 0"))
    assert len(load_task(name, data=path, validation_size=2).validation) == 2
    with pytest.raises(ValueError, match=f"{name}: got validation_size=7, expected 1 to 6"):
        load_task(name, data=path, validation_size=7)
    with pytest.raises(ValueError, match="got train_size, expected only"):
        load_task(name, data=path, train_size=7)


def test_mmlu(tmp_path):
    task = load_task("mmlu", data=lines(tmp_path / "mine.json", [*CHOICES, CHOICES[0] | {"subject": ""}]))
    assert (task.train, task.validation, task.shared_prefix, len(task.choices)) == ([], [], "", 7)
    first, last = task.choices[0], task.choices[-1]
    assert first.prompt == (
        "The following are multiple choice questions (with answers) about small numbers.\n\n"
        "0 + 1 is\nA. 0\nB. 1\nC. none\nAnswer:"
    )
    assert (first.choices, first.correct, first.best) == ((" A", " B", " C"), (1,), 1)
    assert last.prompt.startswith("The following are multiple choice questions (with answers).\n\n0 + 1")
    assert len(mmlu(tmp_path / "mine.json", validation_size=3).choices) == 3


@pytest.mark.parametrize("name", HUB)
def test_hub_rows_become_local_ones(tmp_path, monkeypatch, name):
    asked = []

    def load_dataset(*source, split):
        asked.append((*source, split))
        return [ON_HUB[name]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    local = lines(tmp_path / f"{name}.jsonl", (CHOICES if name == "mmlu" else OPEN)[:1])
    assert load_task(name) == load_task(name, data=local)
    assert asked == [HUB[name]]


@pytest.mark.parametrize(
    ("load", "bad", "message"),
    [
        (triviaqa, {"question": "q"}, "line 2: got .'question'., expected the keys question and answers"),
        (triviaqa, {"question": " ", "answers": ["a"]}, "question must be a text"),
        (triviaqa, {"question": "q", "answers": "a"}, "answers must be a list of texts, got 'a'"),
        (nq_open, {"question": "q", "answers": [" "]}, "expected an answer"),
        (nq_open, [], "got list, expected the keys"),
        (mmlu, {"question": "q", "choices": ["a"], "answer": 0}, "expected 2 to 10 choices, got 1"),
        (mmlu, {"question": "q", "choices": ["a", "b"], "answer": 2}, "index of one of 2 choices, got 2"),
        (mmlu, {"question": "q", "choices": ["a", "b"], "answer": "A"}, "index of one of 2 choices, got 'A'"),
        (mmlu, {"question": "q", "choices": ["a", "b"], "answer": 1, "subject": 3}, "subject must be a text"),
    ],
)
def test_open_domain_rejects_a_row(tmp_path, load, bad, message):
    good = CHOICES[0] if load is mmlu else OPEN[0]
    # not .json: a list would be taken for the array of all rows
    with pytest.raises(ValueError, match=message):
        load(lines(tmp_path / "rows.jsonl", [good, bad]))


def test_open_domain_rejects_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nq_open\.jsonl: no such file"):
        nq_open(tmp_path)
    with pytest.raises(ValueError, match="triviaqa: .*got no rows"):
        triviaqa(lines(tmp_path / "rows.jsonl", []))
