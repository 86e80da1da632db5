"""`--select` and `--fast` of train, select and sweep: what they set, what wins over them, and what they refuse."""

import json

import pytest

from lofit_fast.config import FAST_ANSWER, FAST_RECIPE
from lofit_fast.patching.storage import read_adapter
from tests.cli.calling import QUICK_STEP2, as_json, error_of


@pytest.fixture
def where(model, data):
    return "--model", model, "--data", data, *QUICK_STEP2


def recipe_of(where, *arguments):
    return as_json("train", *where, "--top", "2", "--dry-run", *arguments)["recipe"]


def test_train_chooses_as_asked(where, tmp_path, monkeypatch):
    monkeypatch.setattr("lofit_fast.training.summary.can_draw", lambda: False)
    chosen = ("--top", "2", "--select", "saliency", "--select-examples", "4")
    done = as_json("train", *where, "--output", tmp_path, *chosen)
    assert (done["recipe"]["select"], done["recipe"]["select_examples"]) == ("saliency", 4)
    assert "accuracy_after_select" not in done
    assert json.loads((tmp_path / "heads.json").read_text())["select"] == "saliency"


def test_fast_sets_what_it_says_and_gives_way(where):
    plain, fast = recipe_of(where), recipe_of(where, "--fast")
    assert {key: value for key, value in fast.items() if value != plain[key]} == FAST_RECIPE
    assert recipe_of(where, "--fast", "--select", "lofit") == plain
    answers = recipe_of(where, "--fast", "--positions", "answer")
    assert (answers["tune_lr"], answers["top"]) == (FAST_ANSWER["tune_lr"], plain["top"])
    assert recipe_of(where, "--fast", "--select-examples", "7")["select_examples"] == 7


def test_scales_are_trained_where_asked(where, tmp_path, monkeypatch):
    monkeypatch.setattr("lofit_fast.training.summary.can_draw", lambda: False)
    assert recipe_of(where)["tune_scales"] is False
    assert as_json("train", *where, "--output", tmp_path, "--heads", "all", "--tune-scales")["recipe"]["tune_scales"]
    config = read_adapter(tmp_path / "adapter").config
    assert config.scale == config.offset


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--select", "magic"), "expected select to be one of"),
        (("--select-examples", "9"), "expected None with select='lofit'"),
        (("--heads", "x.json", "--select", "saliency"), "nothing for --select to choose"),
        (("--heads", "all", "--top", "0.1", "--l1", "0"), "nothing for --top or --l1 to choose"),
        (("--heads", "all", "--select-lr", "0.1", "--fast"), "nothing for --select-lr to choose"),
        (("--fast", "--select-epochs", "1"), "--select-epochs is of lofit, early_stop, bias_norm, got saliency"),
        (("--select", "random", "--l1", "0.1"), "--l1 is of lofit, early_stop, bias_norm, saliency, got random"),
    ],
)
def test_train_refuses(where, arguments, message):
    assert message in error_of("train", *where, "--dry-run", *arguments)


def test_select_looks_at_so_many(model, data):
    some = ("--model", model, "--data", data, "--top", "2", "--dtype", "float32", "--device", "cpu")
    assert len(as_json("select", *some, "--select-examples", "4")["methods"][0]["heads"]) == 2
    assert "--select-examples is of saliency" in error_of(
        "select", *some, "--method", "random", "--select-examples", "4"
    )


def test_a_sweep_is_fast_where_it_says_nothing(tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text('[base]\nmodel = "tiny"\n[grid]\nselect = ["lofit", "saliency"]\n')
    runs = as_json("sweep", grid, "--dry-run", "--fast")["runs"]
    assert [(run["recipe"]["select"], run["recipe"]["select_examples"]) for run in runs] == [
        ("lofit", None),
        ("saliency", FAST_RECIPE["select_examples"]),
    ]
    grid.write_text('[base]\nmodel = "tiny"\n[grid]\nseed = [1, 2]\n')
    assert [run["recipe"]["select"] for run in as_json("sweep", grid, "--dry-run", "--fast")["runs"]] == [
        "saliency"
    ] * 2
    grid.write_text('[base]\nmodel = "tiny"\n[grid]\nselect = [1]\n')
    assert "expected a text in quotes" in error_of("sweep", grid, "--dry-run")
