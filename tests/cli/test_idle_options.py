"""Options that have no use beside others are refused by name, before anything is loaded, read or written."""

import json

import pytest

from tests.cli.calling import ON_CPU, error_of

LETTERS = "abcdefghijklmnopqrst"
# a command in which options have no use -> those
IDLE = {
    ("heads", "--adapter", "none", "--prompt", "a"): {
        "--task": "kinship",
        "--data": "x.jsonl",
        "--split": "test",
        "--subset": "en",
        "--columns": "prompt=question",
        "--pictures": 4,
    },
    ("push", "--adapter", "none", "--repo", "me/mine", "--output", "page", "--dry-run"): {
        "--revision": "v1",
        "--private": None,
    },
    ("train", "--dry-run"): {"--profile": None},
    ("eval",): {"--strict": None},
    ("generate", "--prompt", "a"): {"--strict": None},
}
CASES = [(command, option, value) for command, options in IDLE.items() for option, value in options.items()]
ROWS = {
    "pairs": [{"prompt": f"{a}=", "completion": a * 2} for a in LETTERS],
    "preferences": [{"prompt": f"{a}?", "chosen": f" {a}", "rejected": f" {a}{a}"} for a in LETTERS],
}


@pytest.fixture(params=ROWS)
def rows(request, tmp_path):
    """A file of 20 rows of one kind."""
    path = tmp_path / f"{request.param}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[request.param]))
    return path


@pytest.mark.parametrize(
    ("command", "option", "value"), CASES, ids=[f"{command[0]} {option}" for command, option, _ in CASES]
)
def test_an_option_without_a_use_is_refused(command, option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *others = command
    given = (option,) if value is None else (option, value)
    # a model that is not there: the option is looked at before it
    message = error_of(name, "--model", tmp_path / "none", *others, *given)
    assert f"there is nothing for {option} to do" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--devices", "nonsense"), "device 'nonsense' is not here"),
        (("--devices", "cpu,cpu,cpu"), "got 3 devices for 2 runs"),
        (("--devices", "cpu", "--jobs", "2"), "expected one of jobs, devices"),
        (("--together", "2", "--jobs", "2"), "got together=2 and jobs=2"),
        (("--no-resume",), "there is nothing for --no-resume to do"),
    ],
)
def test_a_sweep_that_is_only_listed_is_checked_as_one_that_runs(options, message, tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text('[base]\nmodel = "none"\n[grid]\nseed = [1, 2]\n')
    assert message in error_of("sweep", grid, "--dry-run", *options)


@pytest.mark.parametrize("command", ["train", "eval", "select"])
def test_turns_are_chosen_of_messages_alone(command, rows, model, tmp_path):
    output = ("--output", tmp_path / "out") if command != "eval" else ()
    message = error_of(command, "--model", model, "--data", rows, *output, "--train-on", "last", *ON_CPU)
    assert "got train_on='last', which is of rows with messages" in message and rows.stem[:5] in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", ["preferences"], indirect=True)
def test_choices_are_scored_in_no_batches(rows, model):
    message = error_of("eval", "--model", model, "--data", rows, *ON_CPU, "--batch-size", "3")
    assert "got batch_size=3, but the choices of the task 'preferences'" in message
