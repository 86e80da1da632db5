"""What `fit` is called with: numbers and heads of any library are taken, and everything else is refused by name."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import lofit_fast as lf
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, QUICK

OF_ANOTHER_KIND = {
    "model": (None, "smollm2"),
    "tokenizer": (None, "smollm2", {}),
    # what is false is no default either
    "recipe": ({}, {"top": 3}, 0, lf.Recipe),
    "engine": ({}, {"packing": True}, 0),
    "callbacks": (None, [1], 3, [None]),
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
