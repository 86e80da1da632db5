"""The README's Python runs as it stands, on a tiny model in place of the hub's."""

import re
from pathlib import Path

import torch

import lofit_fast as lf
from tests.tiny import tiny_model

README = (Path(__file__).parents[1] / "README.md").read_text()


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
