"""Few-shot prompts as tasks."""

import pytest

from benchmarks.peers.prompting import few_shot
from lofit_fast.tasks.task import Example, MultipleChoice, Preference, Task

TRAIN = [Example(f"Q{n}:", f" a{n}") for n in range(6)]


def test_few_shot_puts_training_examples_before_validation_prompts():
    task = Task("t", TRAIN, [Example("Q?", " yes", ("yes", "yep"))])
    asked = few_shot(task, k=2, seed=1)
    shown = asked.validation[0].prompt.split("\n\n")
    assert len(shown) == 3 and shown[-1] == "Q?"
    assert set(shown[:-1]) < {e.prompt + e.completion for e in TRAIN}
    assert asked.validation[0].answers == ("yes", "yep")
    assert asked.train == TRAIN
    assert few_shot(task, k=2, seed=1) == asked
    assert few_shot(task, k=0).validation == task.validation


def test_few_shot_shows_chosen_answers_after_the_shared_prefix():
    choices = (MultipleChoice("Q?", (" a", " b"), (0,), 0),)
    task = Task("t", [], [], preferences=(Preference("P:", " good", (" bad",)),), choices=choices, shared_prefix="X\n")
    assert few_shot(task, k=1).shared_prefix == "X\nP: good\n\n"
    with pytest.raises(ValueError, match="size of 2"):
        few_shot(task, k=2)
