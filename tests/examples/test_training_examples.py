"""Every training example on a tiny model: it runs, it learns, and its adapter loads."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file

import lofit_fast as lf
from examples import accelerate_loop, autocast_loop, classification, stock_trainer
from examples.material import model_and_stories, tell
from tests.oracle import vectors_of


def with_trl(name):
    """An example that imports TRL, and data sets."""
    pytest.importorskip("datasets")
    pytest.importorskip("trl")
    return importlib.import_module(f"examples.{name}")


EXAMPLES = {
    "sft": lambda *given: with_trl("sft_with_trl").train_sft(*given),
    "dpo": lambda *given: with_trl("dpo_with_trl").train_dpo(*given),
    "trainer": stock_trainer.train_stock,
    "autocast": autocast_loop.train_autocast,
    "accelerate": accelerate_loop.train_accelerated,
    "classification": classification.train_classifier,
}
# the commands run what the tests above run; one of them stays in the quick run
COMMANDS = [
    autocast_loop,
    *(pytest.param(module, marks=pytest.mark.slow) for module in (stock_trainer, accelerate_loop, classification)),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft_with_trl", "dpo_with_trl")),
]


def adapter_in(folder):
    """The vectors of an adapter folder, loaded into a model of the examples' own."""
    model, tokenizer, _ = model_and_stories("tiny")
    return [rows.detach() for _, rows in vectors_of(lf.load(model, folder)).values()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_learns(name, tmp_path, capsys):
    material = classification.classifier_and_stories if name == "classification" else model_and_stories
    model, tokenizer, stories = material("tiny")
    torch.manual_seed(0)
    # few, so that a model that knows nothing can learn them by heart; the example with an evaluation keeps eight for it
    stories = stories[: 12 if name == "trainer" else 4]
    losses = tell(EXAMPLES[name](model, tokenizer, stories, 12, tmp_path))
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert "at first" in capsys.readouterr().out
    if name != "classification":
        assert all(rows.abs().max() > 1e-2 for rows in adapter_in(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_classifier_learns_its_head(kind, tmp_path):
    name = "tiny" if kind == "encoder" else str(tmp_path / "model")
    if kind == "decoder":
        model, tokenizer, _ = model_and_stories("tiny")
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    model, tokenizer, stories = classification.classifier_and_stories(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    classification.train_classifier(model, tokenizer, stories, 2, tmp_path)
    head = load_file(tmp_path / "head.safetensors")
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert head and head.keys() <= kept.keys()
    assert all(torch.equal(head[key], kept[key]) and not torch.equal(head[key], before[key]) for key in head)
    handle = lf.load(classification.classifier_and_stories(name)[0], tmp_path / "adapter")
    assert handle.n_parameters() == 2 * 32


def test_the_stock_example_goes_on(tmp_path):
    for steps in (4, 8):
        losses = stock_trainer.train_stock(*model_and_stories("tiny"), steps, tmp_path)
        assert len(losses) == steps
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8


def test_the_accelerate_example_goes_on(tmp_path):
    first = accelerate_loop.train_accelerated(*model_and_stories("tiny"), 8, tmp_path)
    again = accelerate_loop.train_accelerated(*model_and_stories("tiny"), 4, tmp_path)
    assert sum(again) / 4 < sum(first[:4]) / 4


@pytest.mark.parametrize("module", COMMANDS)
def test_an_example_is_a_command(module, tmp_path, monkeypatch, capsys):
    from typer import Typer
    from typer.testing import CliRunner

    module = with_trl(module) if isinstance(module, str) else module
    app = Typer()
    app.command()(module.main)
    done = CliRunner().invoke(app, ["--model", "tiny", "--steps", "1", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "after 1 steps" in done.output
