"""The commands on vectors that act on answers alone."""

import json

import pytest

from lofit_fast.patching.storage import CONFIG_FILE
from lofit_fast.training.sweep.grid import parse_grid
from tests.cli.calling import QUICK, as_json, call, error_of


@pytest.fixture(scope="module")
def adapter(model, data, tmp_path_factory):
    """The adapter of a run with --positions answer."""
    folder = tmp_path_factory.mktemp("runs") / "answer"
    call("train", "--model", model, "--data", data, "--output", folder, *QUICK, "--positions", "answer", "--json")
    assert json.loads((folder / "summary.json").read_text())["recipe"]["positions"] == "answer"
    return folder / "adapter"


def test_train_writes_it_down_and_eval_and_generate_do_it(adapter, model, data):
    assert json.loads((adapter / CONFIG_FILE).read_text())["positions"] == "answer"
    common = ("--model", model, "--adapter", adapter, "--dtype", "float32", "--device", "cpu")
    assert 0 <= as_json("eval", *common, "--data", data)["exact_match"] <= 1
    (answer,) = as_json("generate", *common, "--prompt", "a=", "--max-new-tokens", "4")
    assert answer["prompt"] == "a="


@pytest.mark.parametrize("command", ["merge", "export"])
def test_no_plain_model_is_written(adapter, model, tmp_path, command):
    message = error_of(command, "--model", model, "--adapter", adapter, "--output", tmp_path / "plain")
    assert "a plain model cannot tell a prompt from an answer" in message
    assert not (tmp_path / "plain").exists()


def test_another_word_is_refused(model, data, tmp_path):
    message = error_of("train", "--model", model, "--data", data, "-o", tmp_path / "run", "--positions", "prompt")
    assert message == "expected positions to be 'all' or 'answer', got 'prompt'"


def test_sweeps_vary_it():
    grid = parse_grid({"base": {"model": "smollm2"}, "grid": {"positions": ["all", "answer"]}})
    assert [run.recipe.positions for run in grid.runs] == ["all", "answer"]
    with pytest.raises(ValueError, match="expected positions to be"):
        parse_grid({"base": {"model": "smollm2", "positions": "prompt"}, "grid": {"seed": [1]}})
