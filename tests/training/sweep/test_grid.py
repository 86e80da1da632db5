"""What a sweep's file says: the runs, their names and recipes, and one clear error for each way to get it wrong."""

import json
import os

import pytest

from lofit_fast.training.sweep.grid import Grid, parse_grid, read_grid
from tests.damaging import VALUES, damaged, revalued

BASE = {"model": "smollm2"}


def test_every_combination_is_a_run(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        """
        [base]
        model = "smollm2"
        task = "clutrr"
        data = "DIR"
        train_size = 300
        top = 0.1
        [grid]
        seed = [1, 2]
        tune_lr = [1e-2, 2e-2]
        [[runs]]
        name = "many heads"
        top = 64
        train_size = 30
        """
    )
    grid = read_grid(path)
    assert (grid.model, grid.task, grid.data, grid.data_seed, grid.dtype) == ("smollm2", "clutrr", "DIR", 42, "auto")
    assert [run.name for run in grid.runs] == [
        "seed=1,tune_lr=0.01",
        "seed=1,tune_lr=0.02",
        "seed=2,tune_lr=0.01",
        "seed=2,tune_lr=0.02",
        "many_heads",
    ]
    assert [run.recipe.seed for run in grid.runs] == [1, 1, 2, 2, 42]
    assert [run.recipe.tune_lr for run in grid.runs] == [1e-2, 2e-2, 1e-2, 2e-2, 1e-2]
    # the task's own defaults, then [base], then the run
    assert {run.recipe.select_lr for run in grid.runs} == {5e-4}
    assert [run.recipe.top for run in grid.runs] == [0.1] * 4 + [64]
    assert [run.train_size for run in grid.runs] == [300] * 4 + [30]
    assert grid.runs[1].varied == {"seed": 1, "tune_lr": 2e-2}


def test_the_engine_is_that_of_all_runs():
    base = {**BASE, "compile": False, "prefix_cache_gb": 2}
    engine = parse_grid({"base": base, "grid": {"seed": [1]}}).engine
    assert (engine.compile, engine.prefix_cache_gb, engine.attention) == (False, 2, "auto")


def test_heads_are_read_from_their_file(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"heads": [[2, 1], [0, 3]], "scores": None}))
    (run,) = parse_grid({"base": BASE, "runs": [{"heads": str(path)}]}).runs
    assert run.heads == ((2, 1), (0, 3))
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no heads"):
        parse_grid({"base": BASE, "grid": {"heads": [str(path)]}})
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="holds no heads"):
        parse_grid({"base": BASE, "grid": {"heads": [str(path)]}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bse": BASE}, "unknown table bse: did you mean base"),
        ({"base": {}}, r"\[base\] needs model"),
        ({"base": BASE}, r"no runs: expected a table \[grid\]"),
        ({"base": {**BASE, "tune_rl": 1}}, r"\[base\]: unknown key tune_rl: did you mean tune_lr"),
        ({"base": BASE, "grid": {"sede": [1]}}, r"\[grid\]: unknown key sede: did you mean seed"),
        ({"base": BASE, "grid": {"zzzz": [1]}}, "unknown key zzzz: expected one of train_size, heads, select_lr"),
        ({"base": BASE, "grid": {"model": ["a"]}}, r"model cannot vary, .* put it into \[base\]"),
        ({"base": BASE, "grid": {"compile": [True]}}, r"compile cannot vary"),
        ({"base": {**BASE, "compile": "yes"}, "grid": {"seed": [1]}}, r"\[base\]: expected compile to be True, False"),
        ({"base": BASE, "grid": {"seed": 1}}, r"\[grid\] seed: expected a list of values, got 1"),
        ({"base": BASE, "grid": {"seed": []}}, "expected a list of values"),
        ({"base": BASE, "grid": {"seed": [1, 1]}}, "a value is listed twice"),
        ({"base": BASE, "grid": {"tune_lr": ["fast"]}}, r"tune_lr: expected a number, got 'fast'"),
        ({"base": BASE, "grid": {"seed": [True]}}, "expected a number, got True"),
        ({"base": BASE, "grid": {"seed": [1.5]}}, "run seed=1.5: expected seed to be an integer"),
        ({"base": BASE, "grid": {"top": [2.0]}}, r"run top=2.0: expected a fraction"),
        ({"base": {**BASE, "train_size": 0}, "grid": {"seed": [1]}}, "train_size: expected a whole number, got 0"),
        ({"base": {**BASE, "task": 3}, "grid": {"seed": [1]}}, "task: expected a text in quotes, got 3"),
        ({"base": BASE, "grid": dict.fromkeys(("seed", "top"), [*range(1, 102)])}, r"got 10201 combinations, expected"),
        ({"base": BASE, "runs": {"seed": 1}}, r"each headed \[\[runs\]\]"),
        ({"base": 1}, "to be tables"),
        ({"base": BASE, "runs": [{"seed": 1}, {"seed": 1}]}, "several runs are called seed=1"),
        ({"base": BASE, "runs": [{"name": "a", "sed": 1}]}, r"\[\[runs\]\] 1: unknown key sed: did you mean seed"),
        ({"base": BASE, "runs": [{"heads": "nowhere.json"}]}, "heads: no such file of heads: nowhere.json"),
    ],
)
def test_mistakes_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        parse_grid(content)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such sweep file"):
        read_grid(tmp_path / "grid.toml")
    (tmp_path / "grid.toml").write_text("[base\n")
    with pytest.raises(ValueError, match="is not TOML"):
        read_grid(tmp_path / "grid.toml")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "grid.toml")
    with pytest.raises(ValueError, match="grid.toml is no file"):
        read_grid(tmp_path / "grid.toml")


def test_a_mark_before_the_text_is_no_matter(tmp_path):
    (tmp_path / "grid.toml").write_text('[base]\nmodel = "é"\n[grid]\nseed = [1]', encoding="utf-8-sig")
    assert read_grid(tmp_path / "grid.toml").model == "é"


GRID = """
[base]
model = "smollm2"
data = "a.jsonl"
top = 0.1
columns = {prompt = "question"}
[grid]
seed = [1, 2]
tune_lr = [1e-2, 2e-2]
[[runs]]
name = "many heads"
max_length = 64
"""


def read_or_refused(path, content):
    path.write_bytes(content)
    try:
        assert isinstance(read_grid(path), Grid)
    except (ValueError, OSError) as error:
        assert str(path) in str(error), error
        assert not isinstance(error, UnicodeError | RecursionError)


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_read_or_refused(tmp_path, count):
    for content in damaged(GRID.encode(), count, seed=count):
        read_or_refused(tmp_path / "grid.toml", content)


def test_another_value_anywhere_is_read_or_refused():
    runs = [{"name": "a", "seed": 3, "heads": "x"}, {"top": 4}]
    content = {"base": {**BASE, "data": "a", "columns": {"prompt": "b"}}, "grid": {"l1": [1, 2]}, "runs": runs}
    for one in [*revalued(content, 200), *VALUES]:
        try:
            parse_grid(one)
        except ValueError as error:
            assert "grid" in str(error)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"heads": ["all"], "top": [2, 3]}, "heads gives the heads, so there is nothing for top to choose"),
        (
            {"select": ["lofit", "random"], "select_lr": [0.1]},
            "select_lr is of lofit, early_stop, bias_norm, got",
        ),
        ({"select": ["saliency"], "select_epochs": [1, 2]}, "select_epochs is of lofit, early_stop, bias_norm, got"),
    ],
)
def test_what_varies_and_does_nothing_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        parse_grid({"base": {"model": "tiny"}, "grid": grid})


def test_what_all_runs_have_may_be_of_some_of_them():
    base = {"model": "tiny", "top": 2, "select_lr": 0.1}
    runs = parse_grid({"base": base, "runs": [{"heads": "all"}, {"select": "random"}, {"top": 3}]}).runs
    assert [run.recipe.top for run in runs] == [2, 2, 3] and runs[0].heads == "all"
