import json
import os
from pathlib import Path

import pytest

from lofit_fast.tasks import load_task, majority_accuracy
from lofit_fast.tasks.clutrr import clutrr

WORDING = {"template": "Read: {story}\nWhat is {second} to {first}?\n", "completion": "{relation}"}


def row(number, first, second, relation):
    story = f"[{first}] painted a door. [{second}], no. {number}, is the {relation} of [{first}]."
    return {
        "id": str(number),
        "clean_story": story,
        "query": str((first, second)),
        "target_text": relation,
        "target": number,
    }


TRAIN = [row(i, f"Quill{i}", f"Tansy{i}", ("aunt", "niece", "niece")[i % 3]) for i in range(12)]
VALIDATION = [row(0, "Juniper", "O'Bram", "uncle"), row(1, "Moss", "Wren", "niece")]


def write(folder: Path, train=TRAIN, validation=VALIDATION, prompts=None) -> Path:
    (folder / "clutrr").mkdir(parents=True, exist_ok=True)
    (folder / "clutrr" / "train.json").write_text(json.dumps(train), encoding="utf-8")
    (folder / "clutrr" / "val.json").write_text(json.dumps(validation), encoding="utf-8")
    prompts = {"_about": "a test", "clutrr": WORDING} if prompts is None else prompts
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    return folder


def test_clutrr_reads_rows_in_the_wording_of_the_folder(tmp_path):
    task = clutrr(write(tmp_path))
    assert (task.name, len(task.train), len(task.validation)) == ("clutrr", 12, 2)
    example = task.validation[0]
    assert example.prompt == (
        "Read: Juniper painted a door. O'Bram, no. 0, is the uncle of Juniper.\nWhat is O'Bram to Juniper?\n"
    )
    assert (example.completion, example.answers) == ("uncle", ("uncle",))
    assert task.candidates == ("aunt", "niece", "uncle")
    assert [e.completion for e in task.train[:3]] == ["aunt", "niece", "niece"]
    assert majority_accuracy(task) == 0.5
    assert load_task("clutrr", data=str(tmp_path), tokenizer=None) == task


def test_clutrr_train_size_is_a_seeded_nested_subset(tmp_path):
    folder = write(tmp_path)
    everything, five, eight = clutrr(folder), clutrr(folder, train_size=5), clutrr(folder, train_size=8)
    positions = [everything.train.index(example) for example in five.train]
    assert positions == sorted(set(positions)) and len(positions) == 5
    assert all(example in eight.train for example in five.train)
    assert clutrr(folder, train_size=5).train == five.train != clutrr(folder, train_size=5, seed=1).train
    assert five.validation == everything.validation and five.candidates == everything.candidates
    for size in (0, 13):
        with pytest.raises(ValueError, match=f"got train_size={size}, expected 1 to 12, the rows in clutrr/train.json"):
            clutrr(folder, train_size=size)


def test_clutrr_reads_a_changed_file_again(tmp_path):
    assert len(clutrr(write(tmp_path)).train) == 12
    assert len(clutrr(write(tmp_path, train=TRAIN[:4])).train) == 4


@pytest.mark.parametrize("name", ["prompts.json", "clutrr/train.json", "clutrr/val.json"])
def test_clutrr_names_the_missing_file(tmp_path, name):
    (write(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        clutrr(tmp_path)
    assert f"no file {name} in {tmp_path}" in str(caught.value)


@pytest.mark.parametrize("field", ["clean_story", "query", "target_text"])
def test_clutrr_names_the_missing_field(tmp_path, field):
    without = [{key: value for key, value in r.items() if key != field} for r in TRAIN]
    with pytest.raises(ValueError, match=rf"train\.json: row 1: no field {field}, got \["):
        clutrr(write(tmp_path / "all", train=without))
    with pytest.raises(ValueError, match=rf"val\.json: row 2: no field {field}, got \["):
        clutrr(write(tmp_path / "one", validation=[VALIDATION[0], without[1]]))
    with pytest.raises(ValueError, match=rf"val\.json: row 2: {field} must be a text, got None"):
        clutrr(write(tmp_path / "null", validation=[VALIDATION[0], VALIDATION[1] | {field: None}]))


@pytest.mark.parametrize("query", ["Moss and Wren", "('Moss',)", "(1, 2)", "'AB'", "("])
def test_clutrr_rejects_a_query_that_is_not_two_names(tmp_path, query):
    with pytest.raises(ValueError, match=r"val\.json: row 1: query must be two names"):
        clutrr(write(tmp_path, validation=[VALIDATION[0] | {"query": query}]))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"other": WORDING}, "expected template and completion under the key clutrr, missing: 'clutrr'"),
        ({"clutrr": {"template": "x"}}, "missing: 'completion'"),
        ({"clutrr": WORDING | {"template": None}}, "template must be a text with fields, got None"),
        ({"clutrr": WORDING | {"template": "{story} {first"}}, "template must be a text with fields"),
        (
            {"clutrr": WORDING | {"template": "{story} {first}"}},
            r"template has the fields \['first', 'story'\], expected",
        ),
        ({"clutrr": WORDING | {"template": "{story} {first} {second} {relation}"}}, "template has the fields"),
        ({"clutrr": WORDING | {"completion": "{}"}}, r"completion has the fields \[''\], expected \['relation'\]"),
    ],
)
def test_clutrr_rejects_a_wording(tmp_path, prompts, message):
    with pytest.raises(ValueError, match=rf"prompts\.json: .*{message}"):
        clutrr(write(tmp_path, prompts=prompts))


def test_clutrr_rejects_files_that_are_not_json_rows(tmp_path):
    (write(tmp_path / "prompts") / "prompts.json").write_text("{")
    with pytest.raises(ValueError, match=r"prompts\.json: expected JSON, got what is not"):
        clutrr(tmp_path / "prompts")
    (write(tmp_path / "rows") / "clutrr" / "train.json").write_text('[{"clean_story": ')
    with pytest.raises(ValueError, match=r"train\.json: line 1, column 18: expected JSON"):
        clutrr(tmp_path / "rows")
    for text in ("", "[]"):
        (write(tmp_path / "empty") / "clutrr" / "val.json").write_text(text)
        with pytest.raises(ValueError, match=r"val\.json: got no rows"):
            clutrr(tmp_path / "empty")


def test_clutrr_reads_the_file_that_is_there(tmp_path):
    path = write(tmp_path) / "clutrr" / "val.json"
    assert clutrr(tmp_path).validation[0].completion == "uncle"
    times = path.stat()
    path.write_text(path.read_text().replace("uncle", "nephs"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert clutrr(tmp_path).validation[0].completion == "nephs"
