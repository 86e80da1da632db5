"""A run folder: opened, gone on with, refused, and read back."""

import json

import pytest
import torch

from lofit_fast.training.run_folder import RunFolder, data_digest, last_checkpoint

IDENTITY = {"recipe": {"top": 2}, "model": {"layers": 3}, "data": "abc", "heads": None}


def row(stage="select", epoch=1, loss=1.0):
    return {"stage": stage, "epoch": epoch, "loss": loss}


def test_run_starts_empty(tmp_path):
    run = RunFolder.open(tmp_path / "deep" / "run", IDENTITY, resume=True)
    assert (run.stage, run.metrics, run.heads, run.scores, run.history) == ("select", {}, None, None, [])
    assert json.loads((run.path / "state.json").read_text())["identity"] == IDENTITY


def test_run_goes_on(tmp_path):
    run = RunFolder.open(tmp_path, IDENTITY, resume=True)
    scores = torch.tensor([[0.1, 0.2], [0.3, 1 / 3]])
    run.record("select", {"seconds": 1.5})
    run.write_heads([(1, 1), (1, 0)], scores)
    run.append_history(row())
    again = RunFolder.open(tmp_path, IDENTITY, resume=True)
    assert (again.stage, again.heads, again.history) == ("tune", [(1, 1), (1, 0)], [row()])
    # through JSON and back without a change
    assert again.scores.equal(scores)
    again.record("tune", {"seconds": 2.5})
    assert again.stage == "done"
    assert again.metrics == {"select": {"seconds": 1.5}, "tune": {"seconds": 2.5}}


def test_run_with_given_heads_has_no_scores(tmp_path):
    run = RunFolder.open(tmp_path, IDENTITY, resume=True)
    run.write_heads([(0, 1)], None)
    assert (run.heads, run.scores) == ([(0, 1)], None)


def test_run_identity_survives_json(tmp_path):
    identity = {**IDENTITY, "heads": ((0, 1), (2, 3))}
    RunFolder.open(tmp_path, identity, resume=True)
    assert RunFolder.open(tmp_path, identity, resume=True).stage == "select"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": "xyz"}, "data"),
        ({"recipe": {"top": 3}}, "recipe"),
        ({"heads": [[0, 1]], "model": {"layers": 4}}, "heads, model"),
        ({"extra": 1}, "extra"),
    ],
)
def test_run_of_another_identity_is_refused(tmp_path, changes, named):
    RunFolder.open(tmp_path, IDENTITY, resume=True).record("select", {})
    before = (tmp_path / "state.json").read_text()
    with pytest.raises(ValueError, match=rf"{tmp_path}.*another {named}: .*resume=False"):
        RunFolder.open(tmp_path, {**IDENTITY, **changes}, resume=True)
    assert (tmp_path / "state.json").read_text() == before


def test_run_starts_over(tmp_path):
    run = RunFolder.open(tmp_path, IDENTITY, resume=True)
    run.write_heads([(0, 1)], None)
    run.append_history(row())
    run.record("select", {"seconds": 1.0})
    run = RunFolder.open(tmp_path, {**IDENTITY, "data": "xyz"}, resume=False)
    assert (run.stage, run.metrics, run.heads, run.history) == ("select", {}, None, [])


def test_run_history_replaces_an_epoch(tmp_path):
    run = RunFolder.open(tmp_path, IDENTITY, resume=True)
    for entry in (row(epoch=1), row(epoch=2, loss=5.0), row("tune", 1), row(epoch=2, loss=4.0)):
        run.append_history(entry)
    assert run.history == [row(epoch=1), row("tune", 1), row(epoch=2, loss=4.0)]


@pytest.mark.parametrize("name", ["state.json", "heads.json"])
def test_run_with_a_truncated_file(tmp_path, name):
    run = RunFolder.open(tmp_path, IDENTITY, resume=True)
    run.write_heads([(0, 1)], None)
    (tmp_path / name).write_text((tmp_path / name).read_text()[:-9])
    with pytest.raises(ValueError, match=rf"{name} is not whole JSON"):
        _ = (RunFolder.open(tmp_path, IDENTITY, resume=True).heads, run.stage)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("content", ["[]", "{}", '{"stage": 5}', '{"_data_files": [], "_split": "train"}'])
def test_a_state_of_something_else_is_neither_read_nor_replaced(tmp_path, content, resume):
    (tmp_path / "state.json").write_text(content)
    (tmp_path / "summary.json").write_text("theirs")
    with pytest.raises(ValueError, match=r"state\.json is not that of a run, .*: choose another folder"):
        RunFolder.open(tmp_path, IDENTITY, resume=resume)
    assert [(tmp_path / name).read_text() for name in ("state.json", "summary.json")] == [content, "theirs"]


def test_run_with_a_truncated_history(tmp_path):
    run = RunFolder.open(tmp_path, IDENTITY, resume=True)
    run.append_history(row())
    (tmp_path / "history.jsonl").write_text('{"stage": "sel')
    with pytest.raises(ValueError, match=r"history\.jsonl is not whole JSON"):
        _ = run.history


def test_run_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write.*file/run"):
        RunFolder.open(tmp_path / "file" / "run", IDENTITY, resume=True)


def test_data_digest():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]
    assert data_digest(rows) == data_digest([dict(reversed(r.items())) for r in rows])
    other_labels = [rows[0], {"input_ids": [3], "labels": [-100]}]
    assert len({data_digest(r) for r in (rows, rows[::-1], rows[:1], other_labels)}) == 4


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    for step in (3, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    # or Trainer would take it for the newest, and keep it instead
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_left_alone(tmp_path, resume):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds adapter but no state\.json"):
        RunFolder.open(tmp_path, {"recipe": 1}, resume)
    assert (tmp_path / "adapter" / "mine.txt").read_text() == "mine"
