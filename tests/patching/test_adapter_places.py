"""Folders that an adapter is not written into: nothing of anybody else's is lost."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import lofit_fast as lf
from tests.tiny_models import tiny_model


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def handle():
    return lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 0)]))


@pytest.mark.parametrize("through", ("itself", "link"))
def test_a_model_s_folder_is_refused(handle, tmp_path, through):
    """Stock code takes an adapter_config.json beside a model for a part of it, and no longer loads the model."""
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    before = files_in(folder)
    target = folder
    if through == "link":
        target = tmp_path / "link"
        target.symlink_to(folder)
    with pytest.raises(ValueError, match=r"holds a model \(model.safetensors\)"):
        handle.save(target)
    assert files_in(folder) == before
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("export", (False, True))
def test_somebody_else_s_adapter_is_refused(handle, tmp_path, export):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(b"theirs")
    before = files_in(folder)
    with pytest.raises(ValueError, match="holds an adapter"):
        lf.export(handle, folder, target="peft") if export else handle.save(folder)
    assert files_in(folder) == before


@pytest.mark.parametrize("target", ("transformers", "peft"))
def test_an_export_does_not_go_into_a_model_s_folder(handle, tmp_path, target):
    tiny_model("llama").save_pretrained(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="holds .*model"):
        lf.export(handle, tmp_path, target=target)
    assert files_in(tmp_path) == before


def test_our_own_and_damaged_ones_are_replaced(handle, tmp_path):
    handle.save(tmp_path)
    handle.save(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LO')
    handle.save(tmp_path)
    loaded = dict(lf.load(tiny_model("llama"), tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], vectors) for name, vectors in handle.named_parameters())
