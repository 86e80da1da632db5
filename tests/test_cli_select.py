"""`lofit-fast select` on a tiny saved model: one method, all of them, and a file that train reads."""

import json

import pytest
from typer.testing import CliRunner

from lofit_fast.cli import app
from lofit_fast.heads import read_heads
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

QUICK = ("--top", "2", "--select-epochs", "1", "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """The options that name a tiny model and 18 examples."""
    folder = tmp_path_factory.mktemp("select")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}=", "completion": a * 2} for a in "abcdefghijklmnopqr"]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "--model", folder / "model", "--data", folder / "data.jsonl"


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def select(where, *arguments):
    return json.loads(call("select", *where, *QUICK, *arguments, "--json").stdout)


def test_select_writes_heads_that_train_reads(where, tmp_path):
    report = select(where, "--output", tmp_path / "heads.json")
    (row,) = report["methods"]
    assert (row["method"], row["overlap"], report["task"]) == ("saliency", None, "completion")
    assert [list(pair) for pair in read_heads(tmp_path / "heads.json")] == row["heads"]
    written = json.loads((tmp_path / "heads.json").read_text())
    assert written["method"] == "saliency"
    assert len(written["scores"]) == 3
    heads = ("--heads", tmp_path / "heads.json", "--tune-epochs", "1", *QUICK, "--json")
    done = json.loads(call("train", *where, "--output", tmp_path / "run", *heads).stdout)
    assert sorted(done["heads"]) == sorted(row["heads"])


def test_select_compares_all(where, tmp_path):
    rows = {row["method"]: row for row in select(where, "--method", "all", "--output", tmp_path / "out")["methods"]}
    assert len(rows) == 7
    assert rows["lofit"]["overlap"] == 1.0
    assert all(0 <= row["overlap"] <= 1 and row["seconds"] > 0 for row in rows.values())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{name}.json" for name in rows} <= names
    # only what was trained leaves a run, from which the next call goes on
    assert {name for name in names if name.endswith("-step1")} == {
        f"{name}-step1" for name in ("lofit", "bias_norm", "early_stop")
    }
    again = select(where, "--method", "lofit", "--method", "random", "--output", tmp_path / "out")["methods"]
    assert again[0]["seconds"] == rows["lofit"]["seconds"]


def test_select_compares_with_a_file_and_leaves_nothing_unasked(where, tmp_path):
    (tmp_path / "mine.json").write_text('{"heads": [[0, 0], [2, 3]]}')
    arguments = ("--method", "random", "--method", "lofit", "--top", "12", "--reference", tmp_path / "mine.json")
    rows = select(where, *arguments)["methods"]
    assert [row["overlap"] for row in rows] == [2 / 12, 2 / 12]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_select_prints_a_table(where):
    out = call("select", *where, *QUICK, "--method", "random", "--method", "iti_probe").stdout
    assert all(word in out for word in ("random", "iti_probe", "seconds", "heads, best first"))


def test_select_refuses(where):
    result = call("select", *where, "--method", "magic", code=1)
    assert "unknown method magic" in result.stderr
    assert "Traceback" not in result.output
