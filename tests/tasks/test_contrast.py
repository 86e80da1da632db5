"""Contrasts: never a correct answer as the wrong one, from every kind of task."""

import pytest

from lofit_fast.tasks import load_task
from lofit_fast.tasks.contrast import contrasts
from lofit_fast.tasks.task import Example, MultipleChoice, Preference, Task, exact_match


def test_a_closed_set_gives_another_candidate():
    task = load_task("kinship", train_size=40)
    made = contrasts(task)
    assert [c.prompt for c in made] == [e.prompt for e in task.train]
    for contrast, example in zip(made, task.train, strict=True):
        assert contrast.right == example.completion and contrast.wrong in task.candidates
        assert not exact_match(contrast.wrong, example.answers)


def test_open_answers_give_another_examples_answer():
    task = Task("open", [Example("a", " 1"), Example("b", " 2", ("2", "3")), Example("c", " 3")], [])
    made = contrasts(task)
    assert made[1].wrong == " 1" and made[0].wrong in (" 2", " 3")


def test_preferences_give_a_rejected_answer_and_the_seed_decides_which():
    task = Task("p", [], [], preferences=[Preference(str(i), "yes", ("no", "never", "nay")) for i in range(20)])
    first, second = contrasts(task, seed=1), contrasts(task, seed=2)
    assert {c.wrong for c in first} <= {"no", "never", "nay"} and first != second and first == contrasts(task, seed=1)


def test_what_counts_as_correct_anywhere_is_never_wrong():
    rows = [Example("q", " a"), Example("q", " b"), Example("other", " c")]
    made = [c for seed in range(20) for c in contrasts(Task("open", rows, []), seed) if c.prompt == "q"]
    assert {c.wrong for c in made} == {" c"}
    pairs = [Preference("q", "a", ("b", "c")), Preference("q", "b", ("a", "d"))]
    drawn = [contrasts(Task("p", [], [], preferences=pairs), seed) for seed in range(20)]
    assert {c.wrong for two in drawn for c in two} == {"c", "d"}


def test_answers_that_are_ranked_are_contrasted_row_by_row():
    pairs = [Preference("q", "A", ("B",)), Preference("q", "B", ("C",)), Preference("s", "hello", ("HELLO!",))]
    made = contrasts(Task("p", [], [], preferences=pairs))
    assert [(c.right, c.wrong) for c in made] == [("A", "B"), ("B", "C"), ("hello", "HELLO!")]
    # of rows whose answers are all that there are, each has the others
    rows = [Example("q", " a"), Example("q", " b")]
    assert [(c.right, c.wrong) for c in contrasts(Task("open", rows, []))] == [(" a", " b"), (" b", " a")]


def test_what_cannot_be_contrasted_is_refused():
    with pytest.raises(ValueError, match="no training examples"):
        contrasts(Task("none", [], []))
    with pytest.raises(ValueError, match="no wrong answer"):
        contrasts(Task("one", [Example("a", " 1")], []))


def test_preferences_and_choices_are_checked():
    with pytest.raises(ValueError, match="rejected answers other than 'yes'"):
        Preference("q", "yes", ("no", "yes"))
    with pytest.raises(ValueError, match="best=1 of 2 choices"):
        MultipleChoice("q", ("a", "b"), (0,), best=1)
    with pytest.raises(ValueError, match="of 2 choices"):
        MultipleChoice("q", ("a", "b"), (0, 1), best=0)
