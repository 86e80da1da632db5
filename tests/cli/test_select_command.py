"""`lofit-fast select` on a tiny saved model: one method, all of them, and a file that train reads."""

import json

import pytest

from lofit_fast.heads import read_heads
from tests.cli.calling import ON_CPU, QUICK_STEP2, as_json, call, error_of

QUICK, ONCE = ("--top", "2", *ON_CPU), ("--select-epochs", "1")


@pytest.fixture
def where(model, data):
    """The options that name a tiny model and its examples."""
    return "--model", model, "--data", data


def select(where, *arguments):
    return as_json("select", *where, *QUICK, *arguments)


def test_select_writes_heads_that_train_reads(where, tmp_path):
    report = select(where, "--output", tmp_path / "heads.json")
    (row,) = report["methods"]
    assert (row["method"], row["overlap"], report["task"]) == ("saliency", None, "completion")
    assert [list(pair) for pair in read_heads(tmp_path / "heads.json")] == row["heads"]
    written = json.loads((tmp_path / "heads.json").read_text())
    assert written["method"] == "saliency"
    assert len(written["scores"]) == 3
    heads = ("--heads", tmp_path / "heads.json", *QUICK_STEP2)
    done = as_json("train", *where, "--output", tmp_path / "run", *heads)
    assert sorted(done["heads"]) == sorted(row["heads"])


def test_select_compares_all(where, tmp_path):
    rows = {
        row["method"]: row for row in select(where, "--method", "all", *ONCE, "--output", tmp_path / "out")["methods"]
    }
    assert len(rows) == 7
    assert rows["lofit"]["overlap"] == 1.0
    assert all(0 <= row["overlap"] <= 1 and row["seconds"] > 0 for row in rows.values())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{name}.json" for name in rows} <= names
    # only what was trained leaves a run, from which the next call goes on
    assert {name for name in names if name.endswith("-step1")} == {
        f"{name}-step1" for name in ("lofit", "bias_norm", "early_stop")
    }
    again = select(where, "--method", "lofit", "--method", "random", *ONCE, "--output", tmp_path / "out")["methods"]
    assert again[0]["seconds"] == rows["lofit"]["seconds"]


def test_select_compares_with_a_file_and_leaves_nothing_unasked(where, tmp_path):
    (tmp_path / "mine.json").write_text('{"heads": [[0, 0], [2, 3]]}')
    arguments = ("--method", "random", "--method", "lofit", "--top", "12", "--reference", tmp_path / "mine.json")
    rows = select(where, *arguments, *ONCE)["methods"]
    assert [row["overlap"] for row in rows] == [2 / 12, 2 / 12]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_select_prints_a_table(where):
    out = call("select", *where, *QUICK, "--method", "random", "--method", "iti_probe").stdout
    assert all(word in out for word in ("random", "iti_probe", "seconds", "heads, best first"))


@pytest.mark.parametrize(
    ("methods", "setting", "of"),
    [
        (("random", "saliency"), ("--select-lr", "0.1"), "lofit, early_stop, bias_norm, got random, saliency"),
        (("iti_probe",), ("--l1", "0.1"), "lofit, early_stop, bias_norm, saliency, got iti_probe"),
        (("random",), ("--positions", "answer"), "lofit, early_stop, bias_norm, saliency, got random"),
        (("probing_layers",), ("--batch-size", "2"), "lofit, early_stop, bias_norm, saliency, got probing_layers"),
    ],
)
def test_a_setting_that_no_method_takes_is_refused(where, methods, setting, of):
    named = [word for method in methods for word in ("--method", method)]
    assert error_of("select", *where, *named, *setting) == f"{setting[0]} is of {of}"


def test_select_refuses(where):
    result = call("select", *where, "--method", "magic", code=1)
    assert "unknown method magic" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("methods", "expected"), [(("random",), "is no file"), (("random", "saliency"), "is no folder")]
)
def test_a_place_that_heads_cannot_be_written_to_is_known_before_the_work(model, data, tmp_path, methods, expected):
    output = tmp_path / "there"
    output.mkdir() if len(methods) == 1 else output.write_text("")
    named = [word for method in methods for word in ("--method", method)]
    message = error_of("select", "--model", tmp_path / "nowhere", "--data", data, *named, "--output", output)
    assert expected in message


def test_a_file_of_something_else_is_not_replaced(model, data, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"}')
    message = error_of("select", "--model", model, "--data", data, "--method", "random", "--output", config)
    assert "is there, as something else" in message
    assert config.read_text() == '{"model_type": "llama"}'
