"""Losses, gradients and vectors that are not finite: said with step, examples and checkpoint, and gone on from."""

import json
import math
from dataclasses import replace

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training import objectives
from lofit_fast.training.finite_steps import Diverged, FiniteSteps, all_finite, norm_of
from lofit_fast.training.run_folder import RunFolder
from tests.training.tiny_runs import (
    EXAMPLES,
    HELD_OUT,
    QUICK,
    RECIPE,
    assert_same_state,
    assert_whole,
    fit,
    state_of,
    vectors,
)

NAN = torch.tensor(math.nan)
HEADS = [(1, 2), (0, 0)]


def watch(at_once=True, accumulation=1, good=None):
    made = FiniteSteps(at_once, accumulation, lambda number: f"text {number}", lambda: good)
    made.begin(10, 5)
    return made


def test_a_number_is_named_with_its_step_and_examples():
    steps = watch(good="runs/a/checkpoint-10")
    steps.made += [[3, 1], [0, 2]]
    steps.loss(torch.tensor(1.0))
    with pytest.raises(Diverged) as found:
        steps.loss(NAN)
    error = found.value
    assert (error.step, error.epoch, error.examples) == (12, 2.4, [1, 3])
    said = str(error)
    for part in ("the loss is nan in step 12", "examples 1, 3 ('text 0', 'text 2')", "runs/a/checkpoint-10"):
        assert part in said


def test_elsewhere_than_on_a_cpu_numbers_are_read_at_the_epochs_end():
    steps = watch(at_once=False, accumulation=2)
    steps.made += [[n] for n in range(6)]
    parameter = torch.nn.Parameter(torch.zeros(2))
    for batch in range(6):
        # the loss is wrong from the fifth batch on, the gradient from the fourth
        steps.loss(NAN if batch > 3 else torch.tensor(1.0))
        parameter.grad = torch.full((2,), math.inf if batch > 2 else 1.0)
        steps.gradient([parameter])
    with pytest.raises(Diverged, match=r"the gradient's norm is inf in step 12 on example 4 \('text 3'\)"):
        steps.check()
    steps.begin(13, 5)
    steps.check()


def test_many_examples_are_counted():
    steps = watch()
    steps.made.append(list(range(40)))
    with pytest.raises(Diverged, match=r"examples 1, 2, .*, 16 and 24 more \('text 0', 'text 1', 'text 2', \.\.\.\)"):
        steps.loss(NAN)


def test_numbers_are_finite_on_every_device_and_in_every_dtype():
    good = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.long)]
    assert all_finite(good) and all_finite([])
    for bad in (NAN[None], torch.tensor([1.0, math.inf], dtype=torch.float64), torch.tensor([-math.inf]).bfloat16()):
        assert not all_finite([*good, bad])
    assert norm_of([torch.full((2,), 3.0), torch.full((2,), 4.0, dtype=torch.float64)]).item() == pytest.approx(50**0.5)


def poison(monkeypatch, stage_lr, step, what):
    """Let one step of the stage with this learning rate go wrong."""
    trainer = objectives.LofitTrainer
    original = trainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        here = self.args.learning_rate == stage_lr and self.state.global_step == step - 1
        if here and what == "gradient":
            next(iter(self.handle.parameters())).register_hook(lambda gradient: gradient * math.nan)
        return original(self, model, inputs, num_items_in_batch)

    def optimizer_step(self):
        if self.args.learning_rate == stage_lr and self.state.global_step == step:
            with torch.no_grad():
                next(iter(self.handle.parameters()))[0, 0] = math.nan
        original_check(self)

    monkeypatch.setattr(trainer, "training_step", training_step)
    if what == "vector":
        original_check = trainer.check_numbers
        monkeypatch.setattr(trainer, "check_numbers", optimizer_step)


# two steps an epoch: 4 ends the second, 6 the third and the training
@pytest.mark.parametrize(
    ("step", "what"),
    [
        pytest.param(4, "gradient", marks=pytest.mark.slow),
        (6, "gradient"),
        (4, "vector"),
        pytest.param(6, "vector", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_last_step_replaces_no_checkpoint_and_ends_no_run(llama, tmp_path, monkeypatch, step, what):
    before = state_of(llama)
    with monkeypatch.context() as patched, pytest.raises(FloatingPointError) as found:
        poison(patched, RECIPE.tune_lr, step, what)
        fit(llama, tmp_path, RECIPE, heads=HEADS)
    said = str(found.value)
    good = tmp_path / "tune" / f"checkpoint-{step - 2}"
    for part in (f"in step {step} on examples ", "('", f"the last good checkpoint is {good}", "a lower tune_lr"):
        assert part in said
    assert_same_state(llama, before, but=("modes", "config"))
    assert_whole(tmp_path)
    assert RunFolder(tmp_path).stage != "done" and not (tmp_path / "adapter").exists()
    assert not (tmp_path / "tune" / f"checkpoint-{step}").exists()
    # and without the fault the run goes on from there, to the same end
    whole = fit(llama, tmp_path / "whole", RECIPE, heads=HEADS)
    expected = vectors(whole.handle)
    whole.handle.unpatch()
    again = fit(llama, tmp_path, RECIPE, heads=HEADS)
    assert all(a.equal(b) for a, b in zip(vectors(again.handle), expected, strict=True))


def test_a_run_that_diverged_goes_on_with_another_learning_rate(llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(FloatingPointError):
        poison(patched, RECIPE.tune_lr, 4, "gradient")
        fit(llama, tmp_path, RECIPE, heads=HEADS)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["diverged"].items() >= {"stage": "tune", "lr": RECIPE.tune_lr, "step": 4}.items()
    assert len(state["diverged"]["examples"]) == 4
    rates = []
    original = objectives.LofitTrainer.training_step

    def watched(self, *args):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return original(self, *args)

    monkeypatch.setattr(objectives.LofitTrainer, "training_step", watched)
    lower = lf.Recipe(top=3, select_epochs=3, tune_epochs=3, tune_lr=1e-3)
    result = fit(llama, tmp_path, lower, heads=HEADS)
    # two of six steps were done at the old rate
    assert rates == pytest.approx([1e-3 * left / 6 for left in (4, 3, 2, 1)])
    assert [(row["stage"], row["epoch"]) for row in result.history] == [("tune", epoch) for epoch in (1, 2, 3)]
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["stage"] == "done" and state["changed"][0].items() >= {"setting": "tune_lr", "now": 1e-3}.items()


def test_step_1_too(llama, tmp_path):
    with pytest.raises(FloatingPointError, match="a lower select_lr"):
        fit(llama, tmp_path, replace(QUICK, select_lr=1e38))
    assert fit(llama, tmp_path, QUICK).heads


def test_a_loss_of_the_evaluation_data_that_is_not_finite_stops_the_run(llama, tmp_path, monkeypatch):
    evaluate = objectives.LofitTrainer.evaluation_loop

    def broken(self, *args, **options):
        output = evaluate(self, *args, **options)
        output.metrics["eval_loss"] = math.nan
        return output

    monkeypatch.setattr(objectives.LofitTrainer, "evaluation_loop", broken)
    with pytest.raises(FloatingPointError, match="the loss of the evaluation data is nan after step 2"):
        fit(llama, tmp_path, RECIPE, eval_data=HELD_OUT, heads=HEADS)
    assert RunFolder(tmp_path).history == []
    assert not list((tmp_path / "tune").glob("checkpoint-*"))


def test_a_look_at_gradients_that_are_not_finite_stops_the_run(llama, tmp_path):
    with torch.no_grad():
        llama.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="gradients of step 1 are not finite"):
        fit(llama, tmp_path, lf.Recipe(top=2, tune_epochs=1, select="saliency"))
    assert lf.handle_of(llama) is None


def test_preferences_are_watched_too(llama, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from lofit_fast.training import preference_trainer
    from tests.tiny_tokenizers import tiny_tokenizer

    pairs = [{"prompt": e["prompt"], "chosen": e["completion"], "rejected": "zz"} for e in EXAMPLES[:4]]
    original = preference_trainer.AttachmentDPOTrainer.training_step

    def training_step(self, *args):
        if self.state.global_step == 2:
            next(iter(self.handle.parameters())).register_hook(lambda gradient: gradient * math.nan)
        return original(self, *args)

    monkeypatch.setattr(preference_trainer.AttachmentDPOTrainer, "training_step", training_step)
    recipe = lf.Recipe(top=2, select_epochs=2, tune_epochs=1, batch_size=2)
    with pytest.raises(FloatingPointError, match=r"gradient's norm is nan in step 3 on examples \d, \d \('.\+.="):
        lf.fit_preferences(llama, tiny_tokenizer(), pairs, recipe, output_dir=tmp_path, progress=False)
    assert lf.handle_of(llama) is None
    assert [path.name for path in (tmp_path / "select").iterdir()] == ["checkpoint-2"]
