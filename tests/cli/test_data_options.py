"""Data as people have it, from the command line: its options, preferences, and the dry run."""

import csv
import json

import pytest
from transformers import AutoTokenizer

from lofit_fast.cli.options import parse_columns, parse_gb
from tests.cli.calling import QUICK, as_json, call, error_of
from tests.ordinary_sample import crossed

LETTERS = "abcdefghijklmnopqrst"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than what is tested here."""
    for name in ("training.summary.heads_map", "training.summary.loss_curves", "training.sweep.run.sweep_chart"):
        monkeypatch.setattr(f"lofit_fast.{name}", lambda *_: None)


@pytest.fixture
def table(tmp_path):
    """A CSV of 20 questions and answers under names of its own; two are held out."""
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *((f'"{a}"\n=', a * 2) for a in LETTERS)])
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    """A JSONL of 20 preferences; two are held out."""
    path = tmp_path / "prefs.jsonl"
    rows = [
        {"prompt": f"{a}?", "chosen": f" {a}", "rejected": [f" {a}{a}", " no"][: 1 + i % 2]}
        for i, a in enumerate(LETTERS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


NAMED = ("--columns", "prompt=question,completion=answer")
FLOAT = ("--dtype", "float32", "--device", "cpu")


def test_a_csv_with_names_of_its_own_is_trained_on_and_judged(model, table, tmp_path):
    about = ("--model", model, "--data", table, *NAMED)
    summary = as_json("train", *about, "--output", tmp_path / "run", *QUICK)
    report = as_json("eval", *about, "--adapter", tmp_path / "run" / "adapter", *FLOAT)
    assert (report["examples"], report["exact_match"]) == (2, summary["accuracy_after_tune"])
    (row,) = as_json("select", *about, "--top", "2", *FLOAT)["methods"]
    assert len(row["heads"]) == 2


def test_preferences_of_ones_own_are_trained_with_dpo_and_judged_by_the_held_out(model, pairs, tmp_path):
    pytest.importorskip("trl")
    run, about = tmp_path / "run", ("--model", model, "--data", pairs)
    summary = as_json("train", *about, "--beta", "0.2", "--seed", "5", "--output", run, *QUICK)
    assert summary["task"] == "preferences"
    identity = json.loads((run / "state.json").read_text())["identity"]
    assert (identity["objective"], identity["beta"]) == ("preferences", 0.2)
    report = as_json("eval", *about, "--adapter", run / "adapter", *FLOAT)
    assert (report["task"], report["examples"]) == ("preferences", 2)
    assert {key: report[key] for key in ("mc1", "mc2")} == {key: summary[key] for key in ("mc1", "mc2")}
    (row,) = as_json("select", *about, "--top", "2", *FLOAT)["methods"]
    assert len(row["heads"]) == 2


def test_split_and_subset_reach_the_hub(model, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"question": f"{a}=", "answer": a} for a in LETTERS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    about = ("--model", model, "--data", "owner/set", "--split", "test", "--subset", "en", *NAMED)
    as_json("eval", *about, *FLOAT)
    as_json("select", *about, "--method", "random", *FLOAT)
    as_json("train", *about, "--output", tmp_path / "run", *QUICK, "--dry-run")
    assert asked == [("owner/set", "en", "test")] * 3


@pytest.mark.parametrize("command", ["train", "eval", "select"])
def test_help_explains_the_options(command):
    text = " ".join(call(command, "--help").stdout.replace("│", " ").split())
    for words in (
        ".csv",
        ".parquet",
        "hub data set",
        "--split",
        "--subset",
        "--columns",
        "prompt=question",
    ):
        assert words in text


BAD = [
    (("--columns", "prompt"), "expected --columns like prompt=question,completion=answer, got 'prompt'"),
    (("--columns", "prompt=a,prompt=b"), "expected every name once in --columns"),
    (("--columns", "promt=a"), "got the name 'promt', expected some of prompt, completion"),
    (("--columns", "prompt=nope"), "no column 'nope' to read as prompt, got the columns ['question', 'answer']"),
    ((), "got the keys ['answer', 'question'], expected the keys prompt and completion"),
    ((*NAMED, "--split", "test"), "got split='test', but a file is one split"),
    ((*NAMED, "--subset", "en"), "only data sets of the hub (owner/name) have subsets"),
    (("--task", "clutrr", "--split", "test"), "task 'clutrr': got split, expected only:"),
    ((*NAMED, "--beta", "0.1"), "--beta is of DPO"),
]


# in the ordinary run each in one way; slow: each in both
@pytest.mark.parametrize("options, message, more", crossed(BAD, [[], ["--dry-run"]]))
def test_bad_options(model, table, tmp_path, options, message, more):
    output = ("--output", tmp_path / "run")
    assert message in error_of("train", "--model", model, "--data", table, *output, *QUICK, *options, *more)
    assert not (tmp_path / "run").exists()


def test_parse_gb():
    assert (parse_gb("auto"), parse_gb("0.5")) == ("auto", 0.5)
    with pytest.raises(ValueError, match="--prefix-cache-gb to be a number or 'auto', got 'much'"):
        parse_gb("much")


def test_parse_columns():
    assert parse_columns(" prompt = a b ,completion=c=d") == {"prompt": "a b", "completion": "c=d"}


def test_a_dry_run_marks_what_is_learned_and_writes_nothing(model, table, tmp_path):
    arguments = ("train", "--model", model, "--data", table, *NAMED, "--output", tmp_path / "run", *QUICK)
    before = sorted(tmp_path.iterdir())
    text = call(*arguments, "--dry-run").stdout
    assert "example 1, completion: 9 tokens, 3 learned" in text
    assert '"a"' in text and "[[aa</s>]]" in text and "example 4" not in text
    for words in (
        "examples",
        "18",
        "held out",
        "tokens of an epoch",
        "longest",
        "truncated",
        "refused",
        "top=2",
        "attention=",
    ):
        assert words in text
    # there is nothing to write, so --output may be left out
    found = as_json("train", "--model", model, "--data", table, *NAMED, *QUICK, "--dry-run")
    assert (found["objective"], found["examples"], found["validation"]) == ("completions", 18, 2)
    assert (found["longest"], found["refused"], len(found["shown"])) == (9, [], 3)
    assert found["engine"].keys() == {"select", "tune"} and found["recipe"]["top"] == 2
    assert [part["learned"] for part in found["shown"][0]["parts"]] == [False, True]
    assert sorted(tmp_path.iterdir()) == before


def test_a_command_that_writes_asks_for_its_folder(model, table, tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text(f"[base]\nmodel = '{model}'\n[grid]\ntop = [2]\n")
    assert "got no --output" in call("train", "--model", model, "--data", table, *NAMED, code=1).stderr
    assert "got no --output" in call("sweep", grid, code=1).stderr
    assert len(as_json("sweep", grid, "--dry-run")["runs"]) == 1


def test_a_dry_run_of_preferences(model, pairs, tmp_path):
    pytest.importorskip("trl")
    found = as_json("train", "--model", model, "--data", pairs, "--output", tmp_path / "run", *QUICK, "--dry-run")
    assert (found["objective"], found["examples"], found["validation"]) == ("preferences", 18, 2)
    assert [shown["role"] for shown in found["shown"]] == ["chosen", "rejected"] * 3
    assert not (tmp_path / "run").exists()


def test_a_dry_run_lists_all_that_is_refused_and_fails(model, table, tmp_path):
    arguments = ("train", "--model", model, "--data", table, *NAMED, "--output", tmp_path / "run", *QUICK)
    arguments = (*arguments, "--max-length", "7", "--dry-run")
    result = call(*arguments, code=1)
    assert result.stdout.count("refused: example") == 10
    assert (
        "error: training would stop: 20 texts cannot be used, the first in example 1: an example is 9" in result.stderr
    )
    found = as_json(*arguments, code=1)
    assert (len(found["refused"]), found["shown"], found["engine"]) == (20, [], {})
    assert not (tmp_path / "run").exists()


def test_a_sweep_reads_the_same_way(model, table, tmp_path):
    grid = tmp_path / "grid.toml"
    lines = [
        "[base]",
        f"model = {model!r}",
        f"data = {table!r}",
        'columns = {prompt = "question", completion = "answer"}',
    ]
    lines += ['dtype = "float32"', 'device = "cpu"', "select_epochs = 0", "tune_epochs = 1", "[grid]", "top = [2]"]
    grid.write_text("\n".join(lines))
    (run,) = as_json("sweep", grid, "--output", tmp_path / "sweep")["runs"]
    assert run["status"] == "done"
    for old, new, message in (
        ('"question"', '"nope"', "no column 'nope' to read as prompt"),
        ("{prompt", "{promt", "[base]: columns: got the name 'promt'"),
        ('{prompt = "question", completion = "answer"}', '"prompt=question"', 'expected a table such as {prompt = "q'),
        ("columns", "split = 'x'\ncolumns", "got split='x', but a file is one split"),
    ):
        (tmp_path / "bad.toml").write_text(grid.read_text().replace(old, new, 1))
        assert message in error_of("sweep", tmp_path / "bad.toml", "--output", tmp_path / "other")


def test_train_on_says_which_turns_are_learned(model, tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in LETTERS))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    tokenizer.save_pretrained(model)
    about = ("--model", model, "--data", str(data), "--output", tmp_path / "run", "--dry-run", *QUICK)
    learned = {which: as_json("train", *about, "--train-on", which)["learned_tokens"] for which in ("all", "last")}
    assert learned["all"] > learned["last"] > 0
    assert as_json("train", *about)["learned_tokens"] == learned["all"]
    assert "expected all or last" in error_of("train", *about, "--train-on", "first")
