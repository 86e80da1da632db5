"""Completions and preferences go through one driver: what holds for the one holds for the other."""

import json

import pytest
import torch

import lofit_fast as lf
from lofit_fast.tasks.task import Preference
from lofit_fast.training import fit as fit_module
from lofit_fast.training.objectives import Completions, Preferences
from lofit_fast.training.run_folder import RunFolder
from tests.ordinary_sample import slow_if
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import assert_equal_vectors, assert_same_state, assert_whole, state_of, vectors

EXAMPLES = [{"prompt": f"{a}+{b}=", "completion": b + a} for a, b in zip("abcdef", "mnopqr", strict=True)]
PAIRS = [Preference(f"Q: {a}? A:", f" {a}.", (f" {b}!", " z!")) for a, b in zip("abcdef", "mnopqr", strict=True)]
OBJECTIVES = {"completions": Completions(EXAMPLES), "preferences": Preferences(PAIRS)}
RECIPE = lf.Recipe(top=3, select_epochs=2, tune_epochs=3, batch_size=3, tune_lr=3e-2)


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    if request.param == "preferences":
        pytest.importorskip("trl")
    return OBJECTIVES[request.param]


def run(model, objective, folder, recipe=RECIPE, **how):
    return fit_module.fit_objective(
        model, tiny_tokenizer(), objective, recipe, output_dir=folder, progress=False, **how
    )


def test_both_public_functions_are_the_driver(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(fit_module, "fit_objective", lambda *args, **how: seen.append((args[2], how)))
    how = {"output_dir": tmp_path, "engine": lf.Engine(compile=False), "heads": [(0, 1)], "step1_dir": tmp_path}
    lf.fit(None, None, EXAMPLES, RECIPE, **how)
    lf.fit_preferences(None, None, PAIRS, RECIPE, beta=0.3, **how)
    assert [objective for objective, _ in seen] == [Completions(EXAMPLES), Preferences(PAIRS, 0.3)]
    # the same arguments, none dropped on the way
    assert seen[0][1] == seen[1][1]
    assert how.items() <= seen[0][1].items()


def test_driver_keeps_what_it_chose(objective, tmp_path):
    run(tiny_model("llama"), objective, tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["identity"]["objective"] == objective.name
    assert state["identity"]["dtype"] == "float32"
    assert state["engine"].keys() == {"select", "tune"}
    for engine in state["engine"].values():
        assert "auto" not in engine.values()


# completions are interrupted in test_fit_resume.py in the ordinary run
@pytest.mark.parametrize("objective", slow_if(lambda name: name == "completions", list(OBJECTIVES)), indirect=True)
@pytest.mark.parametrize(("stage", "epoch"), [("select", 2), pytest.param("tune", 3, marks=pytest.mark.slow)])
def test_driver_resumes_inside_a_stage(objective, tmp_path, monkeypatch, stage, epoch):
    whole = run(tiny_model("llama"), objective, tmp_path / "whole")
    append, trained = RunFolder.append_history, []

    def cut(self, row):
        if (row["stage"], row["epoch"]) == (stage, epoch):
            raise KeyboardInterrupt
        append(self, row)

    model = tiny_model("llama")
    before = state_of(model)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "append_history", cut)
        run(model, objective, tmp_path / "cut")
    assert_same_state(model, before, but=("modes", "config"))
    assert_whole(tmp_path / "cut")
    torch.manual_seed(999)
    with monkeypatch.context() as patched:
        patched.setattr(
            RunFolder, "append_history", lambda self, row: trained.append(row["stage"]) or append(self, row)
        )
        resumed = run(model, objective, tmp_path / "cut")
    # from the last checkpoint on, and not from the stage's beginning
    assert trained == (["select"] * 1 + ["tune"] * 3 if stage == "select" else ["tune"])
    assert resumed.heads == whole.heads
    assert_equal_vectors(vectors(resumed.handle), vectors(whole.handle))


def test_driver_goes_on_with_the_engine_it_began_with(objective, tmp_path, monkeypatch):
    append = RunFolder.append_history

    def cut(self, row):
        if row["stage"] == "tune":
            raise KeyboardInterrupt
        append(self, row)

    model = tiny_model("llama")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "append_history", cut)
        run(model, objective, tmp_path, engine=lf.Engine(attention="eager"))
    with pytest.raises(ValueError, match=r"begun with attention=eager, got sdpa"):
        run(model, objective, tmp_path, engine=lf.Engine(attention="sdpa"))
    seen = set()
    model.register_forward_pre_hook(lambda m, _: seen.add(m.config._attn_implementation) if m.training else None)
    # "auto" would be another one here
    run(model, objective, tmp_path)
    assert seen == {"eager"}


def test_driver_refuses_another_dtype(objective, tmp_path):
    run(tiny_model("llama"), objective, tmp_path).handle.unpatch()
    with pytest.raises(ValueError, match="another dtype"):
        run(tiny_model("llama", torch.bfloat16), objective, tmp_path)


def test_driver_shares_step_1(objective, tmp_path):
    rows = []
    for lr in (1e-2, 2e-2):
        recipe = lf.Recipe(top=3, select_epochs=1, tune_epochs=1, batch_size=3, tune_lr=lr)
        folder = tmp_path / str(lr)
        result = run(tiny_model("llama"), objective, folder, recipe, step1_dir=tmp_path / "step1")
        rows.append((result.heads, result.metrics["select"]))
    assert rows[0] == rows[1]
    assert len(list((tmp_path / "step1").iterdir())) == 1


def test_driver_refuses_a_patched_model_and_unknown_heads(objective, tmp_path):
    model = tiny_model("llama")
    for wrong, message in (({"heads": [(9, 0)]}, "does not have"), ({"recipe": lf.Recipe(top=13)}, "top 13 heads")):
        with pytest.raises(ValueError, match=message):
            run(model, objective, tmp_path / "run", **wrong)
    lf.patch(model, lf.LofitConfig(offset="all"))
    with pytest.raises(ValueError, match="already patched"):
        run(model, objective, tmp_path / "run")
    assert not (tmp_path / "run").exists()
