"""Step 1 the way the recipe says: in `fit`, alone, interrupted, shared, dry, and what it leaves in the folder."""

import json
from dataclasses import replace

import pytest
import torch

import lofit_fast as lf
from lofit_fast.config import FAST_ANSWER, FAST_RECIPE, LOOKING_ONCE, RECIPES, SELECT, fast_settings
from lofit_fast.heads import select_heads
from lofit_fast.models.prompt_states import PROMPTS
from lofit_fast.plots import SCORE_NAMES
from lofit_fast.selection.methods import SELECTORS
from lofit_fast.tasks.task import Example, Preference, Task
from lofit_fast.training import objectives
from lofit_fast.training.choice.ways import WAYS, Trained, Untrained
from lofit_fast.training.dry_run import dry_run
from lofit_fast.training.engine import FAST_ENGINE
from lofit_fast.training.first_epoch import loss_sum
from lofit_fast.training.fit import select_untrained
from lofit_fast.training.objectives import Completions
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import (
    CLOCKED,
    EXAMPLES,
    HELD_OUT,
    assert_equal_vectors,
    assert_same_state,
    fit,
    state_of,
    vectors,
)

TASK = Task("completions", [Example(**row) for row in EXAMPLES], [])
RECIPE = lf.Recipe(top=3, batch_size=3, select_epochs=2, tune_epochs=1)
PAIRS = [Preference(f"{a}+b=", a + "b", ("b" + a, "q")) for a in "cdefgh"]


def chosen_by(select, **settings):
    return replace(RECIPE, select=select, **settings)


def test_every_table_has_every_way():
    assert list(SELECT) == list(WAYS) == list(SCORE_NAMES)
    assert set(SELECT) < set(SELECTORS)
    assert set(LOOKING_ONCE) == {name for name, way in WAYS.items() if isinstance(way, Untrained) and way.looks}
    assert lf.Recipe().select == "lofit"


@pytest.mark.parametrize(
    "select",
    [
        pytest.param(name, marks=pytest.mark.slow) if isinstance(way, Trained) else name
        for name, way in WAYS.items()
        if name != "lofit"
    ],
)
def test_in_fit_is_as_alone(select, tmp_path):
    model = tiny_model("llama")
    before = state_of(model)
    result = fit(model, tmp_path / "fit", chosen_by(select), eval_data=HELD_OUT)
    how = {"output_dir": tmp_path / "alone"}
    alone = SELECTORS[select](tiny_model("llama"), tiny_tokenizer(), TASK, RECIPE, **how)
    assert result.heads == alone.heads == select_heads(result.scores, 3)
    assert result.scores.equal(alone.scores)
    assert result.metrics["select"]["seconds"] > 0
    assert ("exact_match" in result.metrics["select"]) == isinstance(WAYS[select], Trained)
    rows = [row for row in result.history if row["stage"] == "select"]
    assert rows
    assert all(row["seconds"] >= 0 for row in rows)
    assert json.loads((tmp_path / "fit" / "heads.json").read_text())["select"] == select
    result.handle.unpatch()
    assert_same_state(model, before, but=("modes", "config"))


def test_what_is_tuned_is_what_those_heads_give(tmp_path):
    model = tiny_model("llama")
    result = fit(model, tmp_path / "chosen", chosen_by("saliency"))
    tuned = vectors(result.handle)
    result.handle.unpatch()
    given = fit(model, tmp_path / "given", RECIPE, heads=result.heads)
    assert_equal_vectors(vectors(given.handle), tuned)


@pytest.mark.parametrize("select", ["saliency", "random"])
def test_preferences_too(select, tmp_path):
    pytest.importorskip("trl")
    how = {"output_dir": tmp_path / "fit", "progress": False}
    # what does not train has no use for epochs
    recipe = chosen_by(select, select_epochs=0)
    result = lf.fit_preferences(tiny_model("llama"), tiny_tokenizer(), PAIRS, recipe, **how)
    task = Task("preferences", [], [], preferences=tuple(PAIRS))
    alone = SELECTORS[select](tiny_model("llama"), tiny_tokenizer(), task, recipe, output_dir=tmp_path / "alone")
    assert result.heads == alone.heads
    assert [row["stage"] for row in result.history] == ["select", "tune"]


def test_a_look_is_one_pass_over_so_many_examples(tmp_path, monkeypatch):
    rows = []
    model = tiny_model("llama")
    model.register_forward_pre_hook(
        lambda module, args, options: rows.append(len(options["input_ids"])) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    _, took = select_untrained(model, tiny_tokenizer(), Completions(EXAMPLES), chosen_by("saliency"), progress=False)
    assert sum(rows) == 12
    assert took["examples_per_s"] * took["seconds"] == pytest.approx(12)
    rows.clear()
    scores, took = _look(model, select_examples=5)
    assert sum(rows) == 5
    assert took["examples_per_s"] * took["seconds"] == pytest.approx(5)
    # the seed draws them; more than there are means all
    assert not scores.equal(_look(model, select_examples=5, seed=7)[0])
    assert _look(model, select_examples=99)[0].equal(_look(model)[0])


def _look(model, **settings):
    recipe = chosen_by("saliency", **settings)
    return select_untrained(model, tiny_tokenizer(), Completions(EXAMPLES), recipe, progress=False)


def test_a_look_has_the_engine_of_a_step(tmp_path):
    fit(tiny_model("llama"), tmp_path, chosen_by("saliency"), engine=lf.Engine(attention="eager", packing=False))
    engines = json.loads((tmp_path / "state.json").read_text())["engine"]
    assert engines["select"] == {**engines["tune"], "prefix_cache_gb": 0.0}
    assert (engines["select"]["attention"], engines["select"]["compile"]) == ("eager", False)


def test_engines_change_the_rounding_alone():
    exact = torch.get_default_dtype()
    assert exact == torch.float32
    scores = []
    for engine in (lf.Engine(attention="eager", packing=False, narrow=False), lf.Engine()):
        how = {"engine": engine, "progress": False}
        args = (tiny_model("llama"), tiny_tokenizer(), Completions(EXAMPLES), chosen_by("saliency", l1=0.0))
        scores.append(select_untrained(*args, **how)[0])
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)


def test_a_look_takes_packed_rows():
    # as flash attention has them, which no CPU has
    made = tiny_model("llama"), tiny_tokenizer(), Completions(EXAMPLES), chosen_by("saliency")
    engines = [lf.Engine(attention="sdpa", compile=False, packing=packing) for packing in (True, False)]
    packed, padded = (select_untrained(*made, engine=engine, progress=False)[0] for engine in engines)
    torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-3)


def test_another_selection_is_another_run(tmp_path):
    model = tiny_model("llama")
    first = fit(model, tmp_path, chosen_by("saliency", select_examples=6))
    first.handle.unpatch()
    for other in (RECIPE, chosen_by("random"), chosen_by("saliency"), chosen_by("saliency", select_examples=7)):
        with pytest.raises(ValueError, match="another recipe"):
            fit(model, tmp_path, other)
    again = fit(model, tmp_path, chosen_by("saliency", select_examples=6))
    assert (again.heads, again.metrics, again.history) == (first.heads, first.metrics, first.history)


@pytest.mark.slow
def test_a_look_that_was_interrupted_is_looked_again(tmp_path, monkeypatch):
    model = tiny_model("llama")
    whole = fit(model, tmp_path / "whole", chosen_by("saliency"))
    whole.handle.unpatch()
    before = state_of(model)
    with monkeypatch.context() as patched:
        patched.setattr("lofit_fast.training.run_folder.RunFolder.record", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(model, tmp_path / "cut", chosen_by("saliency"))
    assert_same_state(model, before, but=("modes", "config"))
    on = fit(model, tmp_path / "cut", chosen_by("saliency"))
    assert on.heads == whole.heads
    kept = [{key: row[key] for key in row.keys() - CLOCKED - {"peak_memory_bytes"}} for row in on.history]
    assert [row["stage"] for row in kept] == ["select", "tune"]


def _interrupt(*_):
    raise KeyboardInterrupt


def test_what_a_step_1_depends_on():
    same = chosen_by("saliency", top=4, tune_lr=1e-3, select_lr=1.0, select_epochs=9, max_grad_norm=2.0)
    assert same.of_step1() == chosen_by("saliency").of_step1()
    assert chosen_by("saliency", select_examples=6).of_step1() != chosen_by("saliency").of_step1()
    # when early stopping ends depends on how many heads must have settled
    assert chosen_by("early_stop", top=4).of_step1() != chosen_by("early_stop").of_step1()
    assert len({tuple(chosen_by(select).of_step1().items()) for select in WAYS}) == len(WAYS)
    # as it was before there was a choice, so that step 1 of older sweeps is found
    assert "select" not in RECIPE.of_step1()


def test_step_1_is_shared_by_what_it_depends_on(tmp_path):
    model, shared = tiny_model("llama"), tmp_path / "step1"
    settings = [chosen_by("saliency"), chosen_by("saliency", top=4), chosen_by("random")]
    folders = []
    for number, recipe in enumerate(settings):
        result = fit(model, tmp_path / str(number), replace(recipe, tune_epochs=0), step1_dir=shared)
        result.handle.unpatch()
        folders.append(len(list(shared.iterdir())))
        assert json.loads((tmp_path / str(number) / "heads.json").read_text())["select"] == recipe.select
        # what is tuned with other products than the heads were chosen with would be neither's run
        engines = json.loads((tmp_path / str(number) / "state.json").read_text())["engine"]
        assert list(engines) == (["tune"] if recipe.select == "random" else ["select", "tune"])
    assert folders == [1, 1, 2]


def test_a_dry_run_says_how_heads_are_chosen():
    model, objective = tiny_model("llama"), Completions(EXAMPLES)
    seen = {select: dry_run(model, tiny_tokenizer(), objective, chosen_by(select)) for select in ("saliency", "random")}
    assert {select: found.recipe["select"] for select, found in seen.items()} == {s: s for s in seen}
    assert {select: list(found.engine) for select, found in seen.items()} == {
        "saliency": ["select", "tune"],
        "random": ["tune"],
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"select": "magic"}, "expected select to be one of lofit, early_stop"),
        ({"select": "iti_probe"}, "expected select to be one of"),
        ({"select": None}, "expected select to be one of"),
        ({"select": "saliency", "select_examples": 0}, "expected select_examples >= 1"),
        ({"select_examples": 64}, "expected None with select='lofit'"),
        ({"select": "early_stop", "select_examples": 64}, "expected None with select='early_stop'"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.Recipe(**settings)


def test_a_number_of_examples_is_a_whole_one():
    with pytest.raises(TypeError, match="expected select_examples to be an integer"):
        lf.Recipe(select="saliency", select_examples=6.5)


def test_fast_is_what_its_tables_say_and_gives_way():
    assert lf.Recipe.fast() == lf.Recipe(**FAST_RECIPE)
    assert lf.Recipe.fast(top=0.1, select_examples=9) == lf.Recipe(**{**FAST_RECIPE, "select_examples": 9}, top=0.1)
    assert lf.Recipe.fast(select="lofit") == lf.Recipe()
    assert lf.Recipe.fast(positions="answer") == lf.Recipe(**FAST_RECIPE, **FAST_ANSWER, positions="answer")
    assert lf.Recipe.fast(positions="answer", top=3).top == 3
    assert lf.Engine.fast() == lf.Engine(**FAST_ENGINE)
    assert lf.Engine.fast(attention="eager").attention == "eager"
    with pytest.raises(ValueError, match="expected None with select='lofit'"):
        lf.Recipe.fast(select="lofit", select_examples=9)


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_a_task_wins_over_the_preset_but_not_over_that_of_answers(positions):
    of_task = RECIPES["clutrr"]
    settings = fast_settings({"positions": positions, "l1": 0.25}, of_task)
    tuned = {**of_task, **(FAST_ANSWER if positions == "answer" else {}), "l1": 0.25}
    assert settings == {**FAST_RECIPE, **tuned, "positions": positions}


def test_a_look_acts_on_answers_alone_where_the_vectors_do():
    how = {"select": "saliency", "l1": 0.0}
    scores = {}
    for name, positions, engine in (
        ("all", "all", lf.Engine()),
        ("answers", "answer", lf.Engine()),
        ("padded", "answer", lf.Engine(attention="eager", packing=False, narrow=False)),
    ):
        recipe = replace(RECIPE, positions=positions, **how)
        args = (tiny_model("llama"), tiny_tokenizer(), Completions(EXAMPLES), recipe)
        scores[name] = select_untrained(*args, engine=engine, progress=False)[0]
    assert not scores["all"].allclose(scores["answers"], rtol=1e-2)
    torch.testing.assert_close(scores["answers"], scores["padded"], rtol=1e-3, atol=1e-3)


def test_a_look_that_a_training_follows_goes_on_from_kept_prompts(tmp_path, monkeypatch):
    seen, taken = [], {}
    monkeypatch.setattr(objectives, "loss_sum", lambda model, batch: seen.append(batch) or loss_sum(model, batch))
    for gb in (0.0, 1.0):
        recipe = chosen_by("saliency", positions="answer", select_examples=4)
        result = fit(tiny_model("llama"), tmp_path / str(gb), recipe, engine=lf.Engine(prompt_cache_gb=gb))
        assert all((PROMPTS in batch) == (gb > 0) for batch in seen)
        taken[gb] = result, sum(batch["input_ids"].numel() for batch in seen)
        seen.clear()
    (whole, all_tokens), (kept, tokens) = taken.values()
    assert tokens < all_tokens / 2
    assert whole.heads == kept.heads
    torch.testing.assert_close(whole.scores, kept.scores, rtol=1e-3, atol=1e-3)


def test_a_look_that_nothing_follows_keeps_no_prompts(monkeypatch):
    seen = []
    monkeypatch.setattr(objectives, "loss_sum", lambda model, batch: seen.append(batch) or loss_sum(model, batch))
    recipe = chosen_by("saliency", positions="answer")
    select_untrained(tiny_model("llama"), tiny_tokenizer(), Completions(EXAMPLES), recipe, progress=False)
    assert seen and not any(PROMPTS in batch for batch in seen)


def test_a_look_that_breaks_off_leaves_nothing_on_the_model(tmp_path, monkeypatch):
    def broken(model, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(objectives, "loss_sum", broken)
    model = tiny_model("llama")
    before = state_of(model)
    # the traceback holds on to what the look had open
    with pytest.raises(KeyboardInterrupt) as held:
        fit(model, tmp_path, chosen_by("saliency", positions="answer"))
    hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    assert held.tb is not None and not any(map(any, hooks))
    assert_same_state(model, before)
