"""The demo on a tiny model: everything it writes, and the plain model it ends with."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

import lofit_fast as lf
from examples import demo
from lofit_fast.patching.storage import read_adapter
from tests.library_versions import PICTURES
from tests.tiny_models import HEAD_DIM, tiny_model
from tests.tiny_tokenizers import word_tokenizer

RECIPE = lf.Recipe(top=3, select_epochs=1, tune_epochs=1, batch_size=14)


@pytest.fixture
def model(monkeypatch):
    """The model the demo loads: long enough for its stories, a word a token."""
    loaded = tiny_model("llama", max_position_embeddings=128)
    monkeypatch.setattr(demo, "load_model", lambda name: (loaded, word_tokenizer()))
    monkeypatch.setattr(demo, "RECIPE", RECIPE)
    return loaded


def test_demo(model, tmp_path):
    console = Console(record=True, width=120, file=io.StringIO())
    summary = demo.run_demo(tmp_path, "tiny", 56, 18, console)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (summary["model"], summary["task"], summary["n_heads"]) == ("tiny", "kinship", 3)
    for key in ("accuracy_before", "accuracy_majority", "accuracy_after_tune"):
        assert 0 <= summary[key] <= 1, key
    # 18 stories, one of each relation
    assert summary["accuracy_majority"] == 1 / 18
    assert summary["trainable_parameters"] == 3 * HEAD_DIM
    for key in ("seconds", "seconds_in_all", "tokens_per_s", "step_tokens_per_s", "hook_tokens_per_s"):
        assert summary[key] > 0, key
    assert summary["seconds_in_all"] > summary["seconds"]
    heads = [tuple(pair) for pair in summary["heads"]]
    assert len(heads) == 3
    for name in ("heads.png", "loss.png"):
        assert (tmp_path / name).stat().st_size > 3000 if PICTURES else not (tmp_path / name).exists()
    adapter = read_adapter(tmp_path / "adapter")
    assert set(adapter.config.offset) == set(heads)

    # unpatched, nobody listening, and the offsets in the biases: b = W v
    assert lf.handle_of(model) is None
    assert model.config.attention_bias is True
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("weight"))
    for number, layer in enumerate(model.model.layers):
        o_proj = layer.self_attn.o_proj
        assert type(o_proj) is nn.Linear
        assert not o_proj._forward_pre_hooks
        offset = torch.zeros(4, HEAD_DIM)
        chosen = sorted(h for at, h in heads if at == number)
        if chosen:
            offset[chosen] = adapter.tensors["offset", number]
        torch.testing.assert_close(o_proj.bias.detach(), (o_proj.weight @ offset.flatten()).detach())
    shown = console.export_text()
    assert "before training" in shown
    assert "after, offsets on 3 heads" in shown
    # one bar per step, each full at the end
    assert "2/2 steps" in shown
    assert "4/4 steps" in shown
    assert "lofit-fast generate --model tiny --adapter" in shown
    assert "tokens/s" in shown


@pytest.mark.slow
def test_demo_is_silent_when_asked(model, tmp_path, capsys):
    demo.run_demo(tmp_path, "tiny", 56, 1, Console(quiet=True))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_demo_with_few_stories(model, tmp_path):
    # the timing takes what there is
    assert demo.run_demo(tmp_path, "tiny", 14, 1, Console(quiet=True))["tokens_per_s"] > 0
