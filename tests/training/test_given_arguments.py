"""What `fit` is called with: numbers and heads of any library are taken, and everything else is refused by name."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import lofit_fast as lf
from lofit_fast.tasks.task import Preference
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.fit import select_by_training
from lofit_fast.training.objectives import Completions, Preferences
from lofit_fast.training.stage import train_attachment
from lofit_fast.training.sweep.grid import Run
from tests.ordinary_sample import crossed
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, QUICK

OF_ANOTHER_KIND = {
    "model": (None, "smollm2"),
    "tokenizer": (None, "smollm2", {}),
    # what is false is no default either
    "recipe": ({}, {"top": 3}, 0, lf.Recipe),
    "engine": ({}, {"packing": True}, 0),
    "callbacks": (None, [1], 3, [None], "steps", TrainerCallback(), TrainerCallback, (n for n in [1])),
    "output_dir": (None, 3, b"runs"),
    "step1_dir": (3, b"runs"),
    "heads": ("every", "0,1", 3, [3], [(0, 1.5)]),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def call(base, **changes):
    given = {"model": base, "tokenizer": tiny_tokenizer(), "train": EXAMPLES[:4], "recipe": QUICK, "progress": False}
    return lf.fit(**{**given, **changes})


@pytest.mark.parametrize("name, value", [(name, value) for name, of in OF_ANOTHER_KIND.items() for value in of])
def test_another_kind_is_refused_by_name(model, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="expected"):
        call(model, **{"output_dir": "run", name: value})
    assert not list(tmp_path.iterdir())


class Counts(TrainerCallback):
    """Counts the trainings that it is in."""

    def __init__(self):
        self.begun = 0

    def on_train_begin(self, *args, **_):
        self.begun += 1


def _fitted(callbacks, folder):
    call(tiny_model("llama"), callbacks=callbacks, output_dir=folder)


def _preferred(callbacks, folder):
    pytest.importorskip("trl")
    pairs = [{"prompt": f"{a}?", "chosen": f" {a}", "rejected": " no"} for a in "abcd"]
    how = {"output_dir": folder, "callbacks": callbacks, "progress": False}
    lf.fit_preferences(tiny_model("llama"), tiny_tokenizer(), pairs, QUICK, **how)


def _selected(callbacks, folder):
    how = {"output_dir": folder, "callbacks": callbacks, "progress": False}
    select_by_training(tiny_model("llama"), tiny_tokenizer(), Completions(EXAMPLES[:4]), QUICK, **how)


def _attached(callbacks, folder):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset="all"))
    how = {"output_dir": folder, "callbacks": callbacks, "progress": False}
    train_attachment(handle, tiny_tokenizer(), Completions(EXAMPLES[:4]), Schedule(1e-3, 1), **how)


def _generated(listed):
    return (one for one in listed)


# what takes callbacks -> the trainings of one call
TAKERS = {_fitted: 2, _preferred: 2, _selected: 1, _attached: 1}


@pytest.mark.parametrize("take, hold", crossed(list(TAKERS), [list, tuple, iter, _generated]))
def test_callbacks_of_any_iterable_are_in_every_training(tmp_path, take, hold):
    counts = Counts()
    take(hold([counts]), tmp_path)
    assert counts.begun == TAKERS[take]


@pytest.mark.parametrize("take", TAKERS)
def test_one_callback_without_a_list_is_refused(tmp_path, take):
    with pytest.raises(
        TypeError, match=r"list of TrainerCallback, got <.*Counts.*>: write callbacks=\[Counts\(...\)\]"
    ):
        take(Counts(), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_what_a_generator_gives_is_there_more_than_once(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    texts = Completions(iter(EXAMPLES[:4]), iter(EXAMPLES[4:6]))
    found = [texts.encoded(model, tokenizer, None).identity() for _ in range(2)]
    assert found[0] == found[1] == Completions(EXAMPLES[:4], EXAMPLES[4:6]).encoded(model, tokenizer, None).identity()
    pairs = [Preference("a?", " a", (" b",))]
    assert Preferences(iter(pairs)).preferences == pairs
    assert Run("one", {}, QUICK, heads=iter([(0, 1)])).heads == [(0, 1)]


def test_no_folder_is_not_the_working_folder(model, tmp_path, monkeypatch):
    """A path of no letters used to put step 1 wherever the program ran."""
    monkeypatch.chdir(tmp_path)
    for folder in ("output_dir", "step1_dir"):
        with pytest.raises(ValueError, match="expected the path"):
            call(model, **{"output_dir": "run", folder: ""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "heads", (np.array([[2, 0], [1, 3]]), torch.tensor([[2, 0], [1, 3]]), (pair for pair in [(2, 0), (1, 3)]))
)
def test_heads_of_any_library(model, tmp_path, heads):
    recipe = lf.Recipe(tune_epochs=0, tune_lr=np.float32(0.5), l1=Fraction(1, 4), init_std=np.float64(0.25))
    result = call(model, heads=heads, recipe=recipe, output_dir=tmp_path)
    result.handle.unpatch()
    assert result.heads == [(2, 0), (1, 3)]
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize("number", (np.float32(0.25), np.float64(0.25), np.float16(0.25), Fraction(1, 4), 0.25))
def test_numbers_of_any_library_are_kept_as_plain_ones(tmp_path, number):
    config = lf.LofitConfig(offset=[(0, 0)], init_std=number, seed=np.uint8(7))
    assert config == lf.LofitConfig(offset=[(0, 0)], init_std=0.25, seed=7)
    assert [type(value) for value in (config.init_std, config.seed)] == [float, int]
    lf.patch(tiny_model("llama"), config).save(tmp_path)
    handle = lf.load(tiny_model("llama"), tmp_path)
    assert handle.config == config
    assert type(lf.Recipe(tune_lr=number).tune_lr) is float


@pytest.mark.parametrize(
    "make",
    (
        lambda: lf.LofitConfig(offset="all", init_std=True),
        lambda: lf.LofitConfig(offset="all", init_std=np.float32("inf")),
        lambda: lf.Recipe(l1=np.float32("inf")),
        lambda: lf.Recipe(init_std=Fraction(10**400)),
        lambda: lf.LofitConfig(offset="all", positions=np.array(["all", "answer"])),
        lambda: lf.LofitConfig(offset="all", seed=10**5000),
        lambda: lf.Recipe(batch_size=10**30),
        lambda: lf.Recipe(tune_epochs=2**31),
        lambda: lf.Recipe(seed=10**5000),
        lambda: lf.select_heads([[1.0, 2.0]], 1),
        lambda: lf.select_heads(np.zeros((2, 2)), 1),
        lambda: lf.head_scores(tiny_model("llama")),
        lambda: lf.fit(tiny_model("llama"), tiny_tokenizer(), EXAMPLES, lf.Recipe(top=True), output_dir=Path("x")),
    ),
)
def test_numbers_that_are_none_are_refused(make):
    with pytest.raises((TypeError, ValueError), match="expected"):
        make()
