"""Trainings with relative paths, in the middle of which a callback changes the working folder."""

import json
import os

import pytest
from transformers import TrainerCallback

import lofit_fast as lf
from lofit_fast.files import lasting_path
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.fit import select_by_training
from lofit_fast.training.objectives import Completions
from lofit_fast.training.profiling import ProfileSteps
from lofit_fast.training.run_folder import RunFolder
from lofit_fast.training.stage import train_attachment
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.sweep.small_sweeps import grid_of, written_data
from tests.training.sweep.small_sweeps import run as swept
from tests.training.tiny_runs import EXAMPLES, QUICK, fit


@pytest.fixture
def away(tmp_path, monkeypatch):
    """An empty folder, beside the working folder that a training begins in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "away"


class Away(TrainerCallback):
    """Goes to another folder in the first step."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, *args, **how):
        os.chdir(self.folder)


def test_a_run_stays_in_its_folder(llama, away):
    callbacks = [ProfileSteps("run", warmup=1, steps=1), Away(away)]
    fit(llama, "run", QUICK, step1_dir="shared", callbacks=callbacks).handle.unpatch()
    home = away.parent / "home"
    assert list(away.iterdir()) == []
    assert {path.name for path in home.iterdir()} == {"run", "shared"}
    assert json.loads((home / "run" / "state.json").read_text())["stage"] == "done"
    assert (home / "run" / "adapter").is_dir() and (home / "run" / "profile").is_dir()
    os.chdir(home)
    # and is found there
    fit(llama, "run", QUICK).handle.unpatch()


def test_step_1_alone_and_a_peers_training_stay_too(llama, away):
    objective, tokenizer = Completions(EXAMPLES), tiny_tokenizer()
    run = select_by_training(llama, tokenizer, objective, QUICK, output_dir="run", callbacks=[Away(away)])
    assert len(run.heads) == QUICK.top
    os.chdir(away.parent / "home")
    handle = lf.patch(llama, lf.LofitConfig(offset=run.heads))
    how = {"output_dir": "work", "callbacks": [Away(away)], "progress": False}
    train_attachment(handle, tokenizer, objective, Schedule(1e-2, 1), **how)
    handle.unpatch()
    assert list(away.iterdir()) == []


def test_a_sweep_stays_in_its_folder(away, monkeypatch):
    append = RunFolder.append_history

    def going(self, row):
        os.chdir(away)
        append(self, row)

    grid = grid_of(written_data(away.parent), tune_lr=[1e-2, 2e-2])
    monkeypatch.setattr(RunFolder, "append_history", going)
    rows = swept(grid, "sweep", tiny_model("llama"))
    assert [row["status"] for row in rows] == ["done"] * 2
    assert list(away.iterdir()) == []
    assert {"runs", "step1", "sweep.json"} <= {path.name for path in (away.parent / "home" / "sweep").iterdir()}


def test_a_lasting_path_follows_no_link(away):
    (away / "link").symlink_to(away.parent / "home")
    assert lasting_path(away / "link" / ".." / "run") == away / "link" / ".." / "run"
    assert lasting_path("run") == away.parent / "home" / "run"
