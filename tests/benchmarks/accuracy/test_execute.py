"""Every method's cell on a tiny model: the model comes back untouched, step 1 is shared, what changes it is caught."""

from dataclasses import replace

import pytest

from benchmarks.accuracy import execute
from benchmarks.accuracy.cell_settings import settings_today
from benchmarks.accuracy.fitting import FITTING
from benchmarks.accuracy.method_table import COMBINED, METHODS, SELECTOR_LABELS, TASKS
from benchmarks.accuracy.paper_cells import Cell, as_options
from lofit_fast.config import RECIPES, Recipe
from lofit_fast.tasks import TASKS as LOADERS
from lofit_fast.training.engine import Engine
from tests.tiny_models import LAYERS, tiny_model
from tests.tiny_tokenizers import word_tokenizer

pytest.importorskip("lofit_fast.selection.methods")
pytest.importorskip("benchmarks.peers.table")

CELL = Cell("tiny", "kinship", "zero_shot", 42, 12, 6, 1)
LOFIT = replace(CELL, method="lofit", selector="lofit", options=as_options({"top": 3}))


@pytest.fixture
def executor(tmp_path, monkeypatch):
    """One whose only model is a tiny Llama; `loads` counts."""
    loads = []

    def load(name, **_):
        loads.append(name)
        return tiny_model("llama", max_position_embeddings=512), word_tokenizer()

    monkeypatch.setattr(execute, "load_model", load)
    # compiling every method takes minutes
    made = execute.Executor(None, tmp_path, engine=Engine(compile=False))
    made.loads = loads
    return made


def test_every_method_runs_and_leaves_the_model_alone(executor):
    pytest.importorskip("peft")
    for method, row in METHODS.items():
        # two methods in turn need two epochs
        cell = replace(LOFIT if row.chooses else CELL, method=method, epochs=2 if row.borrows else 1)
        result = executor(cell)
        assert len(result["hits"]) == 6, method
        assert result["metrics"]["exact_match"] == pytest.approx(sum(result["hits"]) / 6)
        assert (result["n_parameters"] > 0) == (row.epochs or row.kind == "fitted")
        assert result["seconds"]["cell"] > 0
    assert executor.loads == ["tiny"]
    assert {row.kind for row in METHODS.values()} == set(FITTING)


def test_combined_methods_are_made_of_lofits_heads_and_lora(executor):
    pytest.importorskip("peft")
    two = replace(LOFIT, epochs=2)
    made = {name: executor(replace(two, method=name)) for name in ("lofit", "lofit_scaled", *COMBINED)}
    lora = executor(replace(CELL, method="lora", epochs=2))
    heads = made["lofit"]["heads"]
    # step 1 is LoFiT's own, and is not run again
    assert all(result["heads"] == heads for result in made.values())
    assert len({result["seconds"]["selection"] for result in made.values()}) == 1
    numbers = {name: result["n_parameters"] for name, result in made.items()}
    assert numbers["lofit_scaled"] == 2 * numbers["lofit"]
    assert numbers["lofit_on_lora"] == numbers["lofit"] + lora["n_parameters"]
    layers = {layer for layer, _ in heads}
    assert numbers["lora_on_heads"] * LAYERS == lora["n_parameters"] * len(layers) < lora["n_parameters"] * LAYERS
    assert made["lora_on_heads"]["settings"]["lora"]["layers"] == sorted(layers)
    # each has half of the epochs, and the settings of its own
    settings = executor(replace(two, method="lofit_on_lora", options=as_options({"top": 3, "lr": 0.5})))["settings"]
    assert (settings["lora"]["epochs"], settings["lofit"]["tune_epochs"], settings["lofit"]["select_epochs"]) == (
        1,
        1,
        2,
    )
    assert (settings["lora"]["lr"], settings["lofit"]["top"]) == (0.5, 3)


def test_two_methods_in_turn_need_two_epochs(executor):
    with pytest.raises(ValueError, match="at least 2 epochs, for two methods in turn, got 1"):
        executor(replace(LOFIT, method="lofit_on_lora"))


@pytest.mark.slow
def test_step1_is_run_once_for_all_its_cells(executor, monkeypatch):
    from lofit_fast.selection import methods

    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return methods.lofit(*arguments, **options)

    monkeypatch.setitem(methods.SELECTORS, "lofit", counted)
    few, many = (executor(replace(LOFIT, options=as_options({"top": top}))) for top in (2, 5))
    assert many["heads"][:2] == few["heads"]
    assert few["seconds"]["selection"] == many["seconds"]["selection"] > 0
    # another number of offsets, as many as head_dim numbers a head
    assert many["n_parameters"] * 2 == few["n_parameters"] * 5
    assert calls == [1]
    executor(replace(LOFIT, seed=43))
    assert calls == [1, 1]


def test_heads_of_another_task_are_those_it_chooses_itself(executor, monkeypatch):
    """The same examples under two names, with other settings of step 1."""
    monkeypatch.setitem(LOADERS, "family", LOADERS["kinship"])
    monkeypatch.setitem(TASKS, "family", TASKS["kinship"])
    monkeypatch.setitem(RECIPES, "family", {"select_lr": 0.3, "tune_lr": 0.5, "l1": 0.0})
    theirs = executor(replace(LOFIT, task="family", train_size=20))
    borrowed = executor(replace(LOFIT, heads_from="family", heads_size=20))
    assert borrowed["heads"] == theirs["heads"] != executor(LOFIT)["heads"]
    # found again, not chosen anew
    assert borrowed["seconds"]["selection"] == theirs["seconds"]["selection"]
    of_step1, of_step2 = (borrowed["settings"][key] for key in ("select_lr", "tune_lr"))
    assert (of_step1, of_step2) == (0.3, Recipe().tune_lr)
    assert borrowed["settings"] == settings_today(replace(LOFIT, heads_from="family", heads_size=20))


@pytest.mark.slow
def test_other_selectors(executor):
    chosen = {name: executor(replace(LOFIT, selector=name))["heads"] for name in SELECTOR_LABELS}
    assert all(len(heads) == 3 for heads in chosen.values())


def test_a_tuning_cell_and_another_task_to_be_judged_on(executor):
    assert len(executor(replace(CELL, split="tuning"))["hits"]) == 6
    result = executor(replace(CELL, outside=("kinship",), n_outside=4))
    assert len(result["outside"]["kinship"]["hits"]) == 4


def test_a_method_that_changes_the_model_is_caught(executor, monkeypatch):
    def spoil(bench, cell):
        next(bench.model.parameters()).data.add_(1.0)
        return FITTING["majority"](bench, cell)

    monkeypatch.setitem(FITTING, "base", spoil)
    with pytest.raises(RuntimeError, match="zero_shot did not leave the model as it was"):
        executor(CELL)
    executor(replace(CELL, method="majority"))
    assert executor.loads == ["tiny", "tiny"]


def test_a_failed_cell_leaves_no_folder(executor, tmp_path, monkeypatch):
    def fail(bench, cell):
        bench.folder.mkdir(parents=True)
        raise FloatingPointError("diverged")

    monkeypatch.setitem(FITTING, "base", fail)
    with pytest.raises(FloatingPointError):
        executor(CELL)
    assert list((tmp_path / "runs").iterdir()) == []
    assert (tmp_path / ".gitignore").read_text() == "*\n"
