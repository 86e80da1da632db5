"""lf.fit after an interruption: the same numbers as in one go."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training.run_folder import RunFolder
from tests.tiny_models import tiny_model
from tests.training.tiny_runs import (
    CLOCKED,
    HELD_OUT,
    RECIPE,
    assert_equal_vectors,
    assert_same_state,
    assert_whole,
    count_steps,
    fit,
    state_of,
    vectors,
)


class Interrupted(BaseException):
    """As a Ctrl-C: not an Exception."""


def interrupt_at(monkeypatch, stage, epoch):
    append = RunFolder.append_history

    def raising(self, row):
        if (row["stage"], row["epoch"]) == (stage, epoch):
            raise Interrupted
        append(self, row)

    monkeypatch.setattr(RunFolder, "append_history", raising)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, and its vectors."""
    result = fit(tiny_model("llama"), tmp_path_factory.mktemp("runs") / "whole", RECIPE, eval_data=HELD_OUT)
    return result, vectors(result.handle)


# in the first case there is no checkpoint yet
@pytest.mark.parametrize(
    ("stage", "epoch"), [("select", 1), pytest.param("select", 2, marks=pytest.mark.slow), ("tune", 2)]
)
def test_fit_resumes(llama, whole, tmp_path, monkeypatch, stage, epoch):
    whole, expected = whole
    before = state_of(llama)
    with monkeypatch.context() as patched:
        interrupt_at(patched, stage, epoch)
        with pytest.raises(Interrupted):
            fit(llama, tmp_path / "cut", RECIPE, eval_data=HELD_OUT)
    assert_same_state(llama, before, but=("modes", "config"))
    assert_whole(tmp_path / "cut")
    torch.manual_seed(999)
    steps = []
    with monkeypatch.context() as patched:
        count_steps(patched, steps)
        resumed = fit(llama, tmp_path / "cut", RECIPE, eval_data=HELD_OUT)
    # two steps an epoch; only what was not checkpointed is trained again
    assert len(steps) == 2 * (3 - epoch + 1) + (6 if stage == "select" else 0)
    assert resumed.heads == whole.heads
    assert resumed.scores.equal(whole.scores)
    assert_equal_vectors(vectors(resumed.handle), expected)
    timeless = [[{k: v for k, v in row.items() if k not in CLOCKED} for row in r.history] for r in (whole, resumed)]
    assert timeless[0] == timeless[1]
    assert resumed.metrics["tune"]["exact_match"] == whole.metrics["tune"]["exact_match"]


# between two files that are written one after the other
@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("write_heads", None),
        pytest.param("record", "select", marks=pytest.mark.slow),
        pytest.param("record", "tune", marks=pytest.mark.slow),
    ],
)
def test_fit_resumes_between_stages(llama, whole, tmp_path, monkeypatch, method, stage):
    whole, expected = whole
    original = getattr(RunFolder, method)

    def raising(self, *args):
        if stage in (None, args[0]):
            raise Interrupted
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, method, raising)
        with pytest.raises(Interrupted):
            fit(llama, tmp_path / "cut", RECIPE)
    assert lf.handle_of(llama) is None
    resumed = fit(llama, tmp_path / "cut", RECIPE)
    assert resumed.heads == whole.heads
    assert_equal_vectors(vectors(resumed.handle), expected)
    assert resumed.metrics.keys() == {"select", "tune"}


def test_fit_of_a_done_run_trains_nothing(llama, tmp_path, monkeypatch):
    first = fit(llama, tmp_path, eval_data=HELD_OUT)
    expected = vectors(first.handle)
    first.handle.unpatch()
    steps = []
    count_steps(monkeypatch, steps)
    again = fit(llama, tmp_path, eval_data=HELD_OUT)
    assert steps == []
    assert (again.heads, again.history, again.metrics) == (first.heads, first.history, first.metrics)
    assert again.scores.equal(first.scores)
    assert lf.handle_of(llama) is again.handle
    assert_equal_vectors(vectors(again.handle), expected)


def test_fit_starts_over(llama, tmp_path, monkeypatch):
    fit(llama, tmp_path).handle.unpatch()
    steps = []
    count_steps(monkeypatch, steps)
    result = fit(llama, tmp_path, resume=False)
    assert len(steps) == 4
    assert len(result.history) == 2


@pytest.mark.slow
def test_fit_starts_over_without_the_old_checkpoints(llama, tmp_path, monkeypatch):
    # a run is replaced by another one, which is interrupted: it must go on from its own checkpoint or from nothing
    other = lf.Recipe(top=3, select_epochs=3, tune_epochs=3, select_lr=1e-1)
    fit(llama, tmp_path / "run", RECIPE).handle.unpatch()
    whole = fit(llama, tmp_path / "whole", other)
    expected = vectors(whole.handle)
    whole.handle.unpatch()
    with monkeypatch.context() as patched:
        interrupt_at(patched, "select", 2)
        with pytest.raises(Interrupted):
            fit(llama, tmp_path / "run", other, resume=False)
    resumed = fit(llama, tmp_path / "run", other)
    assert resumed.scores.equal(whole.scores)
    assert_equal_vectors(vectors(resumed.handle), expected)
