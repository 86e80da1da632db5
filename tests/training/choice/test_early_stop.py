"""Ending step 1 early: when it stops, that it stops nothing else, and what a run folder makes of it."""

import json
from dataclasses import replace

import pytest
from transformers import TrainerCallback

import lofit_fast as lf
from lofit_fast.training.choice.early_stop import SettledHeads
from lofit_fast.training.fit import select_by_training
from lofit_fast.training.objectives import Completions
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

EXAMPLES = [{"prompt": f"{a}+{b}=", "completion": b + a} for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]
# six steps an epoch
RECIPE = lf.Recipe(top=3, batch_size=2, select_epochs=4, tune_epochs=1)
BY_OFFSET = replace(RECIPE, select="bias_norm")
DATA = Completions(EXAMPLES)


def step1(folder, *callbacks, model=None, recipe=RECIPE):
    model = model or tiny_model("llama")
    options = {"output_dir": folder, "callbacks": callbacks, "progress": False}
    return select_by_training(model, tiny_tokenizer(), DATA, recipe, **options)


def steps_of(run):
    return [len(row["step_losses"]) for row in run.history if row["stage"] == "select"]


def test_stops_once_nothing_changes(tmp_path):
    # every overlap is enough
    settled = SettledHeads(3, every=2, threshold=1e-9, patience=3)
    run = step1(tmp_path, settled)
    assert (settled.stopped_at, len(settled.overlaps)) == (8, 3)
    # the second epoch was cut after two of its steps
    assert steps_of(run) == [6, 2]
    assert [row["epoch"] for row in run.history] == [1, 2]
    seen = run.metrics["select"]
    assert seen["examples_per_s"] * seen["seconds"] == pytest.approx(8 * 2)
    assert len(run.heads) == 3


def test_looks_twice_an_epoch_unless_told(tmp_path):
    settled = SettledHeads(1.0)
    run = step1(tmp_path, settled)
    # all heads are always the same ones: three looks are two overlaps
    assert (settled.stopped_at, settled.overlaps) == (9, [1.0, 1.0])
    assert steps_of(run) == [6, 3]


def test_never_stops_what_keeps_changing(tmp_path):
    settled = SettledHeads(3, every=1, threshold=1.0, patience=100)
    assert steps_of(step1(tmp_path, settled)) == [6] * 4
    assert settled.stopped_at is None
    assert len(settled.overlaps) == 23


class Fails(TrainerCallback):
    """Raises after the first step."""

    def on_step_end(self, args, state, control, **_):
        """At once."""
        raise RuntimeError("stopped here")


def test_a_training_that_fails_leaves_no_model_with_it(tmp_path):
    settled = SettledHeads(3)
    with pytest.raises(RuntimeError, match="stopped here"):
        step1(tmp_path, settled, Fails())
    assert settled._handle is None


@pytest.mark.slow
def test_a_run_cut_short_is_the_beginning_of_the_whole_one(tmp_path):
    whole, cut = step1(tmp_path / "whole"), step1(tmp_path / "cut", SettledHeads(3, every=2, threshold=1e-9))
    losses = [loss for row in whole.history for loss in row["step_losses"]]
    assert [loss for row in cut.history for loss in row["step_losses"]] == losses[:6]


@pytest.mark.parametrize("scales", [False, True])
def test_step_2_is_left_alone(tmp_path, scales):
    # all heads are always the same ones
    settled = SettledHeads(1.0, every=1, patience=1)
    model = tiny_model("llama")
    options = {"output_dir": tmp_path / "fit", "callbacks": [settled], "progress": False}
    result = lf.fit(model, tiny_tokenizer(), EXAMPLES, replace(RECIPE, tune_scales=scales), **options)
    assert [(row["stage"], len(row["step_losses"])) for row in result.history] == [("select", 2), ("tune", 6)]
    assert (settled.stopped_at, settled.overlaps) == (2, [1.0])


@pytest.mark.slow
def test_offsets_on_all_heads_are_left_alone(tmp_path):
    options = {"callbacks": [SettledHeads(1.0, every=1, patience=1)], "progress": False, "output_dir": tmp_path}
    assert steps_of(select_by_training(tiny_model("llama"), tiny_tokenizer(), DATA, BY_OFFSET, **options)) == [6] * 4


def test_a_folder_knows_that_its_step_1_was_cut(tmp_path):
    settled = SettledHeads(3, every=2, threshold=1e-9)
    run = step1(tmp_path, settled)
    assert step1(tmp_path, SettledHeads(3, every=2, threshold=1e-9)).history == run.history
    for others in ([], [SettledHeads(3, every=2, threshold=0.5)]):
        with pytest.raises(ValueError, match="another early_stop"):
            step1(tmp_path, *others)


def test_step_1_alone_is_that_of_fit_which_goes_on_from_it(tmp_path):
    model = tiny_model("llama")
    run = step1(tmp_path / "alone", model=model)
    assert lf.handle_of(model) is None
    assert json.loads((tmp_path / "alone" / "state.json").read_text())["stage"] == "tune"
    options = {"progress": False, "recipe": RECIPE}
    on = lf.fit(model, tiny_tokenizer(), EXAMPLES, **options, output_dir=tmp_path / "alone")
    on.handle.unpatch()
    whole = lf.fit(model, tiny_tokenizer(), EXAMPLES, **options, output_dir=tmp_path / "whole")
    assert on.scores.equal(whole.scores)
    assert on.heads == whole.heads == run.heads
    assert on.metrics["select"] == run.metrics["select"]


@pytest.mark.slow
def test_offsets_and_scales_do_not_share_a_folder(tmp_path):
    model = tiny_model("llama")
    by_scale = step1(tmp_path, model=model).scores
    options = {"output_dir": tmp_path, "progress": False}
    with pytest.raises(ValueError, match="another recipe"):
        select_by_training(model, tiny_tokenizer(), DATA, BY_OFFSET, **options)
    by_offset = select_by_training(model, tiny_tokenizer(), DATA, BY_OFFSET, **options, resume=False)
    assert not by_offset.scores.allclose(by_scale)


def test_offsets_on_all_heads_are_penalised_as_scales_are(tmp_path):
    options = {"output_dir": tmp_path, "progress": False, "resume": False}
    plain, penalised = (
        select_by_training(tiny_model("llama"), tiny_tokenizer(), DATA, replace(BY_OFFSET, l1=l1), **options).scores
        for l1 in (0.0, 1.0)
    )
    assert penalised.max() < plain.min()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top": 0}, "at least 1 head"),
        ({"every": 0}, "every"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"patience": 0}, "patience"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SettledHeads(**{"top": 3} | options)
