"""The commands of the accuracy tables: what they refuse, in one line, before anything is read or written."""

import pytest
from typer.testing import CliRunner

from benchmarks.accuracy import __main__, fast_settings, saliency_examples

APPS = {
    "paper": __main__.app,
    "fast_settings": fast_settings.app,
    "saliency_examples": saliency_examples.app,
}
REFUSED = {
    (
        "paper",
        "--report-only --only table1 --seeds 2",
    ): "--report-only is of the plan in --output, and takes no --seeds, --only",
    ("paper", "--report-only --dtype float32 --dry-run"): "takes no --dry-run, --dtype",
    ("paper", "--seeds 0"): "expected at least one seed, got 0",
    ("paper", "--only table9"): "got the experiments table9, expected some of table1",
    ("paper", "--data nowhere --tasks clutrr"): "clutrr: no file prompts.json in nowhere",
    ("fast_settings", "--data nowhere --report-only --budget 3"): "--report-only runs nothing, and takes no --budget",
    ("fast_settings", "--data nowhere --seeds 0"): "expected at least one seed, got 0",
    ("fast_settings", "--data nowhere --setting fastest"): "got the settings fastest, expected some of full",
    ("saliency_examples", "--task clutrr"): "clutrr: expected the folder of their data (--data)",
}


@pytest.mark.parametrize("name, line", REFUSED)
def test_what_is_not_done_is_refused_in_a_line(name, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(APPS[name], line.split())
    assert done.exit_code == 1
    # the terminal's width breaks no line
    assert REFUSED[name, line] in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", APPS)
def test_help_has_examples(name):
    text = CliRunner().invoke(APPS[name], ["--help"]).stdout
    assert "Examples:" in text and "python -m benchmarks.accuracy" in text
