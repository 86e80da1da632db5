"""The README's Python runs as it stands, on a tiny model in place of the hub's, and its numbers are the report's."""

import re
from pathlib import Path

import torch

import lofit_fast as lf
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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


def test_the_measured_table_is_the_reports():
    table = (ROOT / "docs" / "results" / "benchmark" / "table.md").read_text()
    rows, _, evidence = table.strip().partition("\n\n")
    assert rows.startswith("| | SmolLM2-135M") and rows in README
    # the commit that the numbers are of
    assert evidence.rstrip(".") in README
