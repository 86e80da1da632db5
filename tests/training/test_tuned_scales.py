"""A scale beside every offset in step 2: trained, kept, gone on with, merged, and refused where it cannot be had."""

import json
from dataclasses import replace

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching.storage import read_adapter
from lofit_fast.training import fit as fit_module
from lofit_fast.training.engine import compiled_layers
from lofit_fast.training.objectives import Completions, Preferences
from lofit_fast.training.run_folder import RunFolder
from lofit_fast.training.sweep.grid import parse_grid
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.sweep.small_sweeps import grid_of, run, written_data
from tests.training.test_driver import EXAMPLES as FEW
from tests.training.test_driver import PAIRS
from tests.training.tiny_runs import EXAMPLES, QUICK, RECIPE, assert_equal_vectors, fit, vectors

SCALED = replace(QUICK, tune_scales=True, tune_lr=3e-2)
UPPER = [(1, 0), (2, 3)]


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


@pytest.mark.parametrize("objective", [Completions(FEW), Preferences(PAIRS)], ids=["completions", "preferences"])
def test_every_chosen_head_has_both_and_both_move(objective, tmp_path):
    if isinstance(objective, Preferences):
        pytest.importorskip("trl")
    model = tiny_model("llama")
    how = {"output_dir": tmp_path, "progress": False}
    result = fit_module.fit_objective(model, tiny_tokenizer(), objective, SCALED, **how)
    config = result.handle.config
    assert sorted(config.scale) == sorted(config.offset) == sorted(result.heads)
    # far from where they began: a rate of 0.03 for several steps, from numbers of 0.001
    assert all(vector.abs().mean() > 1e-2 for vector in result.handle.parameters())
    saved = read_adapter(tmp_path / "adapter")
    assert saved.config == config
    assert {component for component, _ in saved.tensors} == {"scale", "offset"}
    patched = logits_of(model)
    assert torch.allclose(logits_of(result.handle.merge()), patched, atol=1e-5)


def test_a_run_goes_on_inside_step_2(tmp_path, monkeypatch):
    recipe, append = replace(RECIPE, tune_scales=True), RunFolder.append_history
    whole = fit(tiny_model("llama"), tmp_path / "whole", recipe)

    def cut(self, row):
        if (row["stage"], row["epoch"]) == ("tune", 3):
            raise KeyboardInterrupt
        append(self, row)

    model = tiny_model("llama")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "append_history", cut)
        fit(model, tmp_path / "cut", recipe)
    assert lf.handle_of(model) is None
    resumed = fit(model, tmp_path / "cut", recipe)
    assert_equal_vectors(vectors(resumed.handle), vectors(whole.handle))


def test_a_done_run_comes_back_whole_and_is_no_run_without_them(tmp_path):
    model = tiny_model("llama")
    first = fit(model, tmp_path, SCALED)
    expected = vectors(first.handle)
    first.handle.unpatch()
    again = fit(model, tmp_path, SCALED)
    assert_equal_vectors(vectors(again.handle), expected)
    again.handle.unpatch()
    with pytest.raises(ValueError, match="tune_scales"):
        fit(model, tmp_path, replace(SCALED, tune_scales=False))
    # whole, but with the offsets alone
    handle = lf.patch(model, lf.LofitConfig(offset=first.heads))
    handle.save(tmp_path / "adapter")
    handle.unpatch()
    with pytest.raises(ValueError, match=r"is not scales and offsets on the heads that .*heads\.json"):
        fit(model, tmp_path, SCALED)
    assert lf.handle_of(model) is None


ENGINES = [
    {"packing": True},
    {"prefix_cache_gb": 1.0},
    {"narrow": True},
    {"attention": "eager"},
    {"verify": True},
    # seven seconds of tracing
    pytest.param({"compile": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_knobs_of_the_engine_train_the_same(engine, tmp_path, monkeypatch, dynamo):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")
    made = {
        name: fit(tiny_model("llama"), tmp_path / name, SCALED, EXAMPLES, heads=UPPER, engine=lf.Engine(**knobs))
        for name, knobs in (("plain", {"packing": False, "narrow": False}), ("other", engine))
    }
    for got, expected in zip(*(vectors(result.handle) for result in made.values()), strict=True):
        assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_answers_alone_have_them_too(tmp_path):
    result = fit(tiny_model("llama"), tmp_path, replace(SCALED, positions="answer"))
    assert result.handle.config.positions == "answer" and result.handle.config.scale is not None
    assert all(vector.abs().mean() > 1e-2 for vector in result.handle.parameters())


def test_runs_with_and_without_them_share_step_1(tmp_path):
    grid = grid_of(written_data(tmp_path), tune_scales=[False, True])
    rows = run(grid, tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["done", "done"]
    assert len(list((tmp_path / "sweep" / "step1").iterdir())) == 1
    adapters = [read_adapter(tmp_path / "sweep" / "runs" / planned.name / "adapter").config for planned in grid.runs]
    assert [config.scale is not None for config in adapters] == [False, True]
    assert adapters[0].offset == adapters[1].offset


def test_runs_trained_together_cannot_have_them(tmp_path):
    grid = grid_of(written_data(tmp_path), tune_scales=[False, True])
    with pytest.raises(
        ValueError, match=r"expected together=1, or no tune_scales, got it in 1 of 2 runs \(tune_scales=True"
    ):
        run(grid, tmp_path / "sweep", together=2)
    assert not (tmp_path / "sweep").exists()


def test_it_is_true_or_false(tmp_path):
    with pytest.raises(TypeError, match="expected tune_scales to be True or False, got 1"):
        lf.Recipe(tune_scales=1)
    with pytest.raises(ValueError, match=r"tune_scales: expected true or false, got 1"):
        parse_grid({"base": {"model": "tiny"}, "grid": {"tune_scales": [1]}})


def test_runs_of_before_are_the_same_ones(tmp_path):
    assert "tune_scales" not in lf.Recipe().identity() and lf.Recipe(tune_scales=True).identity()["tune_scales"]
    fit(tiny_model("llama"), tmp_path, QUICK)
    assert "tune_scales" not in json.loads((tmp_path / "state.json").read_text())["identity"]["recipe"]
