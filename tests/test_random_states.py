"""Random numbers that a scope, and a training in it, leave as they were."""

import random

import numpy
import pytest
import torch

import lofit_fast as lf
from lofit_fast.models.trials import trying
from lofit_fast.random_states import same_random_numbers
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.objectives import Completions
from lofit_fast.training.stage import train_attachment
from tests.ordinary_sample import slow_if
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.sweep.small_sweeps import grid_of, run, written_data
from tests.training.tiny_runs import EXAMPLES, QUICK, fit


def drawn():
    """A number of each generator."""
    return random.random(), numpy.random.rand(), torch.rand(()).item()


def seeded():
    random.seed(1)
    numpy.random.seed(2)
    torch.manual_seed(3)


def assert_left_alone(work):
    """What comes after some work is what would have come without it."""
    seeded()
    expected = drawn()
    seeded()
    work()
    assert drawn() == expected


def test_a_scope_that_seeds_and_fails():
    def work():
        with pytest.raises(ValueError), same_random_numbers():
            random.seed(5)
            drawn()
            raise ValueError

    assert_left_alone(work)


def test_trying_a_model(llama):
    def work():
        with trying(llama):
            drawn()

    assert_left_alone(work)


def attached(model, folder):
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    train_attachment(
        handle, tiny_tokenizer(), Completions(EXAMPLES), Schedule(1e-2, 1), output_dir=folder, progress=False
    )
    handle.unpatch()


def preferred(model, folder):
    pytest.importorskip("trl")
    pairs = [{"prompt": f"{a}?", "chosen": f" {a}", "rejected": [" no"]} for a in "abcd"]
    how = {"output_dir": folder, "progress": False}
    lf.fit_preferences(model, tiny_tokenizer(), pairs, QUICK, **how).handle.unpatch()


def swept(model, folder):
    grid = grid_of(written_data(folder), tune_lr=[1e-2, 2e-2])
    run(grid, folder / "one", model)
    run(grid, folder / "together", model, together=2)


WAYS = {
    "sweep": swept,
    "fit": lambda model, folder: fit(model, folder, eval_data=EXAMPLES[:2]).handle.unpatch(),
    "saliency": lambda model, folder: fit(
        model, folder, lf.Recipe(top=2, select="saliency", tune_epochs=1)
    ).handle.unpatch(),
    "attachment": attached,
    "preferences": preferred,
}


@pytest.mark.parametrize("way", slow_if(lambda way: way == "sweep", list(WAYS)))
def test_a_training_leaves_the_callers_random_numbers(llama, tmp_path, way):
    assert_left_alone(lambda: WAYS[way](llama, tmp_path))


def test_a_training_that_fails_does_too(llama, tmp_path):
    def work():
        with pytest.raises(FloatingPointError):
            fit(llama, tmp_path, lf.Recipe(top=2, select_lr=1e38, select_epochs=1))

    assert_left_alone(work)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_scope_keeps_those_of_cuda():
    torch.cuda.manual_seed_all(4)
    expected = torch.rand((), device="cuda").item()
    torch.cuda.manual_seed_all(4)
    with same_random_numbers():
        torch.cuda.manual_seed_all(5)
    assert torch.rand((), device="cuda").item() == expected
