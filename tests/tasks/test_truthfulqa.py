import csv
import json
from pathlib import Path

import pytest

from lofit_fast.tasks import load_task
from lofit_fast.tasks.truthfulqa import FIELDS, truthfulqa

WORDING = {
    "template": "Q: {question} A:",
    "completion": " {answer}",
    "multiple_choice_prefix": "Q: Is water wet?\nA: It is.",
    "multiple_choice_template": "\n\nQ: {question}\nA: {answer}",
}


def row(question, best, correct, incorrect):
    return dict(zip(FIELDS, (question, best, correct, incorrect), strict=True)) | {"Source": "somewhere"}


TRAIN = [row(f"What of {i}?", f"Fact {i}", f"Fact {i}; Fact {i} too", f"Error {i}; Slip {i}") for i in range(9)]
VALIDATION = [
    row(
        "Who won?",
        "Nobody won.",
        "nobody  won; No one did; ; Nobody won.; ",
        "Everyone did; I did!; No one did.;  EVERYONE DID. ;",
    ),
    row("Sign?", 'It lies, as "they" said', "Another answer", "None; Never"),
]


def write(folder: Path, train=TRAIN, validation=VALIDATION, fields=(*FIELDS, "Source"), prompts=None) -> Path:
    (folder / "truthfulqa").mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("val", validation)):
        with (folder / "truthfulqa" / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    (folder / "prompts.json").write_text(json.dumps(prompts or {"truthfulqa": WORDING}))
    return folder


def test_truthfulqa_preferences_and_choices(tmp_path):
    task = load_task("truthfulqa", write(tmp_path))
    assert (task.name, task.train, task.validation, task.candidates) == ("truthfulqa", [], [], ())
    assert len(task.preferences) == 9
    first = task.preferences[0]
    assert (first.prompt, first.chosen, first.rejected) == ("Q: What of 0? A:", " Fact 0.", (" Error 0.", " Slip 0."))
    assert task.shared_prefix == "Q: Is water wet?\nA: It is."
    who, sign = task.choices
    assert who.prompt == "\n\nQ: Who won?\nA:"
    # repeats, empty answers and an error that is also listed as correct are gone
    assert who.choices == (" Nobody won.", " No one did.", " Everyone did.", " I did!")
    assert (who.correct, who.best) == ((0, 1), 0)
    # a best answer that is not listed is one of the correct all the same
    assert sign.choices == (' It lies, as "they" said.', " Another answer.", " None.", " Never.")
    assert sign.correct == (0, 1)


def test_truthfulqa_sizes(tmp_path):
    folder = write(tmp_path)
    everything, four = truthfulqa(folder), truthfulqa(folder, train_size=4)
    assert set(four.preferences) < set(everything.preferences)
    assert len(four.preferences) == 4
    assert four.preferences != truthfulqa(folder, train_size=4, seed=1).preferences
    assert four.choices == everything.choices
    tuning = truthfulqa(folder, train_size=6, tuning_size=3)
    asked = {choice.prompt.split("Q: ")[1].split("\n")[0] for choice in tuning.choices}
    trained = {preference.prompt.split("Q: ")[1].removesuffix(" A:") for preference in tuning.preferences}
    assert (len(asked), len(trained)) == (3, 6)
    assert asked | trained == {row["Question"] for row in TRAIN}
    for options, message in (
        ({"train_size": 10}, "truthfulqa: got train_size=10, expected 1 to 9"),
        ({"tuning_size": 0}, "truthfulqa: got tuning_size=0, expected 1 to 9"),
        ({"tuning_size": 3, "train_size": 7}, "truthfulqa: got train_size=7, expected 1 to 6"),
    ):
        with pytest.raises(ValueError, match=message):
            truthfulqa(folder, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": FIELDS[:3]}, r"train\.csv: no column Incorrect Answers, got \["),
        ({"train": []}, r"train\.csv: got no rows"),
        ({"validation": [TRAIN[0], TRAIN[1] | {"Best Answer": " "}]}, r"row 2, line 3: Best Answer must be a text"),
        ({"train": [row("Q?", "Yes", "Yes; Indeed", "yes.; Indeed")]}, r"line 2: Incorrect Answers holds no answer"),
        ({"train": [row("Q?", ".", "Yes", "No")], "validation": [row("Q?", "No", "No", ".; ;")]}, r"val\.csv: row 1"),
        ({"prompts": {"truthfulqa": WORDING | {"template": "{q}"}}}, r"template has the fields \['q'\]"),
        (
            {"prompts": {"truthfulqa": WORDING | {"multiple_choice_template": "{answer} to {question}"}}},
            "must end with {answer}",
        ),
        ({"prompts": {"clutrr": {}}}, "under the key truthfulqa"),
    ],
)
def test_truthfulqa_errors(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        truthfulqa(write(tmp_path, **changes))


@pytest.mark.parametrize("name", ["prompts.json", "truthfulqa/train.csv", "truthfulqa/val.csv"])
def test_truthfulqa_names_the_missing_file(tmp_path, name):
    (write(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"truthfulqa: no file {name} in"):
        truthfulqa(tmp_path)
