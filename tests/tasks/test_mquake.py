import json
from pathlib import Path

import pytest

from lofit_fast.tasks import exact_match, load_task
from lofit_fast.tasks.mquake import mquake

WORDING = {"template": "Q: Imagine that {edit}. {question} A:", "completion": " {answer}"}


def row(number, **changes):
    rewrite = {"prompt": "{} lives in", "subject": f"Otter {number}", "target_new": {"str": "Rome", "id": "Q1"}}
    content = {
        "requested_rewrite": [rewrite, {"prompt": "unused"}],
        "questions": [f"Where is Otter {number}?", "unused"],
        "new_answer": f"Italy {number}",
        "new_answer_alias": ["IT", "it.", "", "Italia"],
    }
    return content | changes


TRAIN, VALIDATION = [row(i) for i in range(7)], [row(7), row(8, new_answer="Washington, D.C.", new_answer_alias=[])]


def write(folder: Path, train=TRAIN, validation=VALIDATION, prompts=None) -> Path:
    (folder / "mquake").mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("val", validation)):
        (folder / "mquake" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompts.json").write_text(json.dumps(prompts or {"mquake": WORDING}))
    return folder


def test_mquake_prompts_and_answers(tmp_path):
    task = load_task("mquake", write(tmp_path))
    assert (task.name, len(task.train), len(task.validation), task.candidates) == ("mquake", 7, 2, ())
    first, last = task.train[0], task.validation[1]
    assert first.prompt == "Q: Imagine that Otter 0 lives in Rome. Where is Otter 0? A:"
    assert first.completion == " Italy 0"
    assert first.answers == ("Italy 0", "IT", "Italia")
    assert exact_match(" italia\nQ: next", first.answers)
    assert (last.completion, last.answers) == (" Washington, D.C.", ("Washington, D.C.",))
    assert "new_answer_alias" not in mquake(write(tmp_path, train=[{**TRAIN[0]}])).train[0].prompt


def test_mquake_train_size(tmp_path):
    everything, three = mquake(write(tmp_path)), mquake(tmp_path, train_size=3)
    assert [e for e in everything.train if e in three.train] == three.train
    assert len(three.train) == 3
    assert three.validation == everything.validation
    with pytest.raises(ValueError, match="mquake: got train_size=8, expected 1 to 7"):
        mquake(tmp_path, train_size=8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"new_answer": ""}, r"val\.jsonl: line 2: new_answer must be a text"),
        ({"questions": []}, r"line 2: expected requested_rewrite\[0\].*missing: list index"),
        ({"requested_rewrite": [{"prompt": "{} is", "subject": "x"}]}, "line 2: .*missing: 'target_new'"),
        ({"requested_rewrite": [{"prompt": "is", "subject": "x", "target_new": {"str": "y"}}]}, r"one \{\} for"),
        ({"new_answer_alias": "IT"}, "must be a list of texts, got 'IT'"),
    ],
)
def test_mquake_rejects_a_row(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        mquake(write(tmp_path, validation=[row(0), row(1, **bad)]))


def test_mquake_rejects_files(tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl: got no rows"):
        mquake(write(tmp_path, train=[]))
    (write(tmp_path) / "mquake" / "val.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"val\.jsonl: line 1, column 2: expected JSON"):
        mquake(tmp_path)
    (tmp_path / "mquake" / "val.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"mquake: no file mquake/val\.jsonl"):
        mquake(tmp_path)
