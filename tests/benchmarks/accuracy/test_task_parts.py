"""The parts of tasks that cells train on and are judged by."""

import json

import pytest

from benchmarks.accuracy.paper_cells import TUNING, VALIDATION
from benchmarks.accuracy.task_parts import TaskData, survey
from lofit_fast.tasks import open_domain

SIZES = {"train_size": 12, "n_judged": 9}


@pytest.fixture(scope="module")
def data():
    return TaskData(None)


def test_all_seeds_are_judged_by_the_same_questions(data):
    first, second = (data.part("kinship", **SIZES, seed=seed, split=VALIDATION) for seed in (42, 43))
    assert first.validation == second.validation
    assert first.train != second.train
    assert (len(first.train), len(first.validation)) == (12, 9)
    assert data.part("kinship", **SIZES, seed=42, split=VALIDATION) == first


def test_a_smaller_draw_is_part_of_a_larger_one(data):
    small = data.part("kinship", **SIZES, seed=42, split=VALIDATION).train
    large = data.part("kinship", train_size=40, n_judged=9, seed=42, split=VALIDATION).train
    assert all(example in large for example in small)


def test_tuning_never_sees_what_is_set_aside_nor_validation(data):
    whole = data.whole("kinship")
    count = len(whole.train)
    part = data.part("kinship", train_size=count - 9, n_judged=9, seed=42, split=TUNING)
    assert all(example in whole.train for example in part.validation)
    kept, aside = ({id(example) for example in examples} for examples in (part.train, part.validation))
    assert len(kept) == count - 9 and not kept & aside
    other = data.part("kinship", **SIZES, seed=43, split=TUNING)
    assert other.validation == part.validation


def test_survey_counts_and_refuses(tmp_path):
    found = survey(("kinship",), None)
    assert found.train["kinship"] > 100 and found.validation["kinship"] > 50 and found.outside == ()
    (tmp_path / "mmlu.jsonl").write_text("")
    assert survey(("kinship",), tmp_path).outside == ("mmlu",)
    assert survey(("kinship",), tmp_path, hub=True).outside == ("triviaqa", "nq_open", "mmlu")
    with pytest.raises(ValueError, match="got the tasks mmlu, nothing, expected some of clutrr"):
        survey(("nothing", "mmlu"), None)
    with pytest.raises(ValueError, match="clutrr: expected the folder"):
        survey(("clutrr", "kinship"), None)


def test_tasks_for_judging_come_from_the_folder_or_the_hub(tmp_path, monkeypatch):
    def of_the_hub(name):
        return [("hub: row 1", {"question": "who?", "answers": ["the hub"]})]

    monkeypatch.setattr(open_domain, "hub_rows", of_the_hub)
    row = {"question": "who?", "answers": ["the folder"]}
    (tmp_path / "triviaqa.jsonl").write_text(json.dumps(row) + "\n")
    answers = [TaskData(tmp_path).whole(name).validation[0].answers for name in ("triviaqa", "nq_open")]
    assert answers == [("the folder",), ("the hub",)]
