"""The README's Python runs as it stands, on a tiny model in place of the hub's, and its numbers are the reports'."""

import re
from pathlib import Path

import torch

import lofit_fast as lf
from tests.markdown_tables import cells_of
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "docs" / "results"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def test_the_readme_runs(monkeypatch, tmp_path):
    first, second, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **options):
        return tiny_model("llama") if name.startswith("meta-llama/") else real(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(first, names)
    assert names["heads"]
    exec(second, names)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "plain" / "config.json").is_file()
    assert lf.handle_of(names["model"]) is None
    assert isinstance(names["model"](torch.tensor([[3, 4]])).logits, torch.Tensor)


def section(title: str) -> str:
    """What stands below a heading of the README, up to the next one."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE).group(1)


def test_the_measured_table_is_the_reports():
    table = (RESULTS / "benchmark" / "table.md").read_text()
    evidence = table.strip().partition("\n\n")[2]
    shown, reported = cells_of(section("Speed, measured")), cells_of(table)
    assert "target" not in shown[0]
    # every row of the report, in its words, without the columns that the README leaves out
    columns = [reported[0].index(name) for name in shown[0]]
    assert len(shown) > 5 and shown == [[row[column] for column in columns] for row in reported]
    # the commit that the numbers are of
    assert evidence.rstrip(".") in README


def test_every_measured_number_is_in_its_report():
    sources = {
        "Speed, measured": RESULTS / "benchmark" / "table.md",
        "Accuracy, measured": RESULTS / "paper" / "report.md",
    }
    for title, source in sources.items():
        known = set(NUMBER.findall(source.read_text()))
        rows = cells_of(section(title))[1:]
        numbers = {number for row in rows for cell in row[1:] for number in NUMBER.findall(cell)}
        assert len(numbers) > 10 and numbers <= known, f"{title}: {sorted(numbers - known)}"
