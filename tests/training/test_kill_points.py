"""A run that dies at a change of a file, any of them: the restarted one ends as the one that was never stopped."""

import gc
import itertools

import pytest
import torch

import lofit_fast as lf
from lofit_fast.tasks.task import Preference
from lofit_fast.training.choice.early_stop import SettledHeads
from lofit_fast.training.fit import fit_objective
from lofit_fast.training.objectives import Completions, Preferences
from lofit_fast.training.run_folder import RunFolder
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.killed_changes import Killed, killed_at
from tests.training.tiny_runs import CLOCKED, EXAMPLES, assert_equal_vectors, assert_same_state, state_of, vectors

RECIPE = lf.Recipe(top=2, select_epochs=2, tune_epochs=2, batch_size=4)
PAIRS = [Preference(f"Q: {a}? A:", f" {a}.", (f" {b}!", " z!")) for a, b in zip("abcdef", "mnopqr", strict=True)]
# by name: what is learned, how, and the first of the deaths of the ordinary run
RUNS = {
    "completions": (Completions(EXAMPLES[:8]), {}, 9),
    "shared step 1": (Completions(EXAMPLES[:8]), {"step1_dir": True}, 23),
    "saliency": (Completions(EXAMPLES[:8]), {"select": "saliency"}, 13),
    "early stop": (Completions(EXAMPLES[:8]), {"callbacks": True}, 37),
    "preferences": (Preferences(PAIRS), {}, 41),
}


class World:
    """One way to train, and how it ends when nothing stops it."""

    def __init__(self, name, folder):
        self.objective, self.how, self.start = RUNS[name]
        self.model, self.folder = tiny_model("llama"), folder
        self.before = state_of(self.model)
        result = self.run("whole")
        self.heads, self.vectors, self.rows = result.heads, vectors(result.handle), timeless(result.history)
        result.handle.unpatch()

    def run(self, name):
        how = dict(self.how)
        recipe = lf.Recipe(**{**vars(RECIPE), **({"select": how.pop("select")} if "select" in how else {})})
        if how.pop("step1_dir", False):
            how["step1_dir"] = self.folder / f"{name}-step1"
        if how.pop("callbacks", False):
            # settles after three of four steps
            how["callbacks"] = [SettledHeads(1.0, every=1)]
        # another run of the process has drawn numbers meanwhile
        torch.manual_seed(sum(map(ord, name)))
        where = {"output_dir": self.folder / name, "progress": False}
        return fit_objective(self.model, tiny_tokenizer(), self.objective, recipe, **where, **how)

    def dies_and_goes_on(self, number, monkeypatch):
        """Whether there was a change of a file of that number to die at."""
        name = f"cut-{number}"
        with monkeypatch.context() as patched:
            killed_at(patched, number)
            try:
                self.run(name).handle.unpatch()
            except Killed:
                pass
            else:
                return False
        # a killed process holds no lock; here the frames of the one that died do
        gc.collect()
        assert lf.handle_of(self.model) is None
        result = self.run(name)
        assert result.heads == self.heads
        assert timeless(result.history) == self.rows
        assert_equal_vectors(vectors(result.handle), self.vectors)
        assert RunFolder(self.folder / name).stage == "done"
        result.handle.unpatch()
        assert_same_state(self.model, self.before, but=("modes", "config"))
        return True


def timeless(history):
    measured = {*CLOCKED, "peak_memory_bytes"}
    return [{key: value for key, value in row.items() if key not in measured} for row in history]


# of the places to die at, each a test of its own
PARTS = 8
# the ordinary run has one death of each of these
SAMPLE = ("completions", "preferences")


@pytest.fixture(params=[pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in RUNS])
def world(request, tmp_path):
    if request.param == "preferences":
        pytest.importorskip("trl")
    return World(request.param, tmp_path)


def test_a_run_that_dies_at_one_change_of_a_file_goes_on_to_the_same_end(world, monkeypatch):
    assert world.dies_and_goes_on(world.start, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_that_dies_at_any_change_of_a_file_goes_on_to_the_same_end(world, part, monkeypatch):
    places = itertools.count(1 + part, PARTS)
    died = sum(1 for _ in itertools.takewhile(lambda number: world.dies_and_goes_on(number, monkeypatch), places))
    print(f"{died} places died at")
    assert died > 5
