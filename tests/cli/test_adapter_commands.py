"""`convert-adapter` and `push`, and adapters of the hub in the commands that take one."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import lofit_fast as lf
from lofit_fast.patching import hub_push
from lofit_fast.patching.storage import read_adapter
from tests.cli.calling import as_json, call, error_of
from tests.fake_hub import fake_hub
from tests.oracle import randomize
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model


@pytest.fixture
def adapter(model, tmp_path):
    base, _ = lf.load_model(model, device="cpu")
    handle = lf.patch(base, lf.LofitConfig(offset=[(0, 0), (1, 2)]))
    randomize(handle)
    return handle.save(tmp_path / "adapter")


def test_convert_adapter(model, tmp_path):
    vectors = {
        f"model.layers.{layer}.self_attn.attn_{letter}.{head}": torch.zeros(HEAD_DIM)
        for layer in range(LAYERS)
        for letter in "Av"
        for head in range(HEADS)
    }
    vectors["model.layers.1.self_attn.attn_v.3"] += 0.5
    save_file(vectors, tmp_path / "model.safetensors")
    out = tmp_path / "adapter"
    report = as_json("convert-adapter", "--model", model, "--checkpoint", tmp_path / "model.safetensors", "-o", out)
    assert report == {"scaled heads": 0, "shifted heads": 1, "numbers": HEAD_DIM, "output": str(out)}
    assert read_adapter(out).config.offset == ((1, 3),)
    message = error_of("convert-adapter", "--model", model, "--checkpoint", tmp_path / "none", "-o", out)
    assert "none is no adapter folder" in message


def test_push_writes_the_folder_alone(model, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_push, "can_draw", lambda: False)
    out = tmp_path / "page"
    options = ("--model", model, "--adapter", adapter, "--repo", "me/mine", "--license", "mit")
    assert as_json("push", *options, "--dry-run", "--output", out)["folder"] == str(out)
    assert "license: mit" in (out / "README.md").read_text()
    assert "dry_run=True pushes nothing" in error_of("push", *options, "--dry-run")


def test_adapters_of_the_hub_and_other_bases(model, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = ("generate", "-p", "a", "--max-new-tokens", 2, "--device", "cpu", "--model")
    expected = as_json(*ask, model, "--adapter", adapter)
    other = tmp_path / "other"
    tiny_model("llama", seed=9).save_pretrained(other)
    lf.load_model(model)[1].save_pretrained(other)
    with fake_hub(monkeypatch, tmp_path / "cache") as hub:
        commit = hub.commit("me/mine", {path.name: path.read_bytes() for path in adapter.iterdir()})
        for name in ("me/mine", f"me/mine@{commit}"):
            assert as_json(*ask, model, "--adapter", name, "--strict") == expected
        with pytest.warns(UserWarning, match="was trained on other weights than this model has"):
            call(*ask, other, "--adapter", "me/mine")
        message = error_of(*ask, other, "--adapter", "me/mine", "--strict")
        assert re.search(rf"trained on other weights .* this is {other}", message)
        assert "no such repository on the hub" in error_of(*ask, model, "--adapter", "me/none")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_digest"]
