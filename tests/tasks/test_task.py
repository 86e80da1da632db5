import subprocess
import sys
from pathlib import Path

import pytest

from lofit_fast.tasks import TASKS, Example, Task, exact_match, load_task, majority_accuracy
from lofit_fast.tasks.task import Preference, draw

PACKAGE = Path(__file__).parents[2] / "lofit_fast"


def labelled(*labels):
    return [Example("Say it:", f" {label}") for label in labels]


def test_example_answers_default_to_the_stripped_completion():
    assert Example("Q: A:", " Paris\n").answers == ("Paris",)
    assert Example("Q: A:", " Paris\n").completion == " Paris\n"
    assert Example("Q: A:", " Paris", ["Paris", "City of Light"]).answers == ("Paris", "City of Light")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, " x"), TypeError, "prompt must be a string, got NoneType"),
        (("q", 3), TypeError, "completion must be a string, got int"),
        (("q", " \n"), ValueError, r"completion must hold some text, got ' \\n'"),
        (("q", " x", "x"), TypeError, "answers must be several strings"),
        (("q", " x", (1,)), TypeError, "every answer must be a string, got int"),
        (("q", " x", ("x", "")), ValueError, "every answer must hold some text, got ''"),
        (("q", " x", (" \n",)), ValueError, r"every answer must hold some text, got ' \\n'"),
    ],
)
def test_example_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        Example(*arguments)


def test_task_completions_must_be_candidates():
    Task("t", labelled("a"), labelled("b"), (" a", " b"))
    with pytest.raises(ValueError, match="got the completion ' b', expected one of"):
        Task("t", labelled("a"), labelled("b"), (" a", "b"))


def test_a_task_holds_what_generators_give():
    labels = [" a", " b"]
    task = Task("t", iter(labelled("a")), iter(labelled("b")), (label for label in labels))
    assert task == Task("t", labelled("a"), labelled("b"), (" a", " b"))


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" grandson", ("grandson",), True),
        ("Grandson.\nQuestion: how", ("grandson",), True),
        ("\n  grandson  ", ("grandson",), True),
        ('grandson", ', ("grandson",), True),
        ("father", ("father-in-law",), False),
        ("father-in-law", ("father",), False),
        ("a grandson", ("grandson",), False),
        ("New   York", ("new york",), True),
        ("U.S.", ("US", "U.S"), True),
        ("C", ("C++",), False),
        ("50%", ("50",), False),
        ("", ("grandson",), False),
        ("grandson", (), False),
        ("?", ("!",), False),
        ("?", ("?",), True),
        ("one\ntwo\nthree", ("one\ntwo",), True),
        ("one\nthree", ("one\ntwo",), False),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) is expected


def test_an_accent_is_one_whatever_it_is_written_with():
    apart, one = "cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert exact_match(apart, [one]) and exact_match(one, [apart]) and not exact_match("cafe", [one])


def test_an_answer_that_is_rejected_twice_counts_once():
    assert Preference("q", "a", ("b", "c", "b", "c")).rejected == ("b", "c")


def test_exact_match_rejects_one_string_as_answers():
    with pytest.raises(TypeError, match="several strings"):
        exact_match("son", "grandson")
    with pytest.raises(TypeError, match="prediction must be a string"):
        exact_match(None, ("son",))


@pytest.mark.parametrize("nothing", ["", " ", "\n\t"])
def test_exact_match_rejects_an_answer_that_all_texts_would_match(nothing):
    for prediction in ("anything", nothing):
        with pytest.raises(ValueError, match="every answer must hold some text, got '"):
            exact_match(prediction, ["son", nothing])


def test_majority_accuracy_answers_the_commonest_training_label():
    task = Task("t", labelled("son", "aunt", "aunt"), labelled("aunt", "son", "son", "son"))
    assert majority_accuracy(task) == 0.25
    # a tie goes to the first seen
    assert majority_accuracy(Task("t", labelled("son", "aunt"), task.validation)) == 0.75
    with pytest.raises(ValueError, match="no validation examples"):
        majority_accuracy(Task("t", labelled("son"), []))
    with pytest.raises(ValueError, match="no train examples"):
        majority_accuracy(Task("t", [], labelled("son")))


def test_draw_is_seeded_nested_and_ascending():
    small, large = draw(100, 10, 42), draw(100, 40, 42)
    assert small == sorted(set(small)) and len(small) == 10 and len(large) == 40
    assert set(small) < set(large) < set(range(100))
    assert small == draw(100, 10, 42) != draw(100, 10, 43)
    assert small == [1, 7, 9, 12, 19, 41, 44, 67, 89, 94]
    assert draw(5, 5, 0) == [0, 1, 2, 3, 4] and draw(5, 0, 0) == []
    for size in (-1, 6):
        with pytest.raises(ValueError, match=f"got a size of {size}, expected one from 0 to the 5"):
            draw(5, size, 0)


def test_load_task_passes_what_the_loader_takes():
    # the tokenizer is offered to every task, and used by those that take one
    task = load_task("kinship", tokenizer=object(), train_size=36, seed=7, validation_size=18)
    assert (task.name, len(task.train), len(task.validation)) == ("kinship", 36, 18)
    assert task == TASKS["kinship"](36, 18, seed=7)
    assert len(load_task("kinship").train) == 300


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kin", {}, "got the task 'kin', expected one of: clutrr, completion, kinship"),
        ("kinship", {"data": "folder"}, "'kinship': got data, expected only: train_size, validation_size, seed"),
        ("kinship", {"hops": 2}, "'kinship': got hops"),
        ("clutrr", {}, "'clutrr' needs data, got none"),
        ("completion", {"train_size": 3}, "'completion' needs data, got none"),
    ],
)
def test_load_task_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, **options)


def test_import_is_cheap():
    # the package around it is stood in for: this is about the tasks alone
    code = f"""
import sys, types
package = types.ModuleType("lofit_fast")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["lofit_fast"] = package
import lofit_fast.tasks
loaded = {{name.split(".")[0] for name in sys.modules}} & {{"torch", "transformers", "datasets", "numpy", "triton"}}
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
