"""A base model's folder is data: code in it and pickled weights are refused, and never run nor asked about."""

import builtins
import json

import pytest
import torch

from lofit_fast.models.load import load_model
from lofit_fast.models.op_paths import layers_of
from tests.planted_pickle import Planted
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()
from transformers import LlamaConfig as PlantedConfig, LlamaForCausalLM as PlantedModel
"""
AUTO_MAP = {"AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.PlantedModel"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A saved tiny Llama with its tokenizer, and Python code beside it; a question at the terminal is an error."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "planted.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    (tmp_path / "model" / "custom_generate").mkdir()
    (tmp_path / "model" / "custom_generate" / "generate.py").write_text(CODE.format(ran=str(tmp_path / "ran")))

    def asked(*_):
        raise AssertionError("the user was asked whether to run code")

    monkeypatch.setattr(builtins, "input", asked)
    return tmp_path / "model"


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_code_beside_a_known_model_is_passed_over(folder, tmp_path):
    rewrite(folder / "config.json", auto_map=AUTO_MAP)
    rewrite(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.PlantedConfig", None]})
    model, _ = load_model(str(folder), device="cpu")
    assert type(model).__module__.startswith("transformers.models.llama")
    assert layers_of(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_code_is_refused(folder, tmp_path):
    rewrite(folder / "config.json", auto_map=AUTO_MAP, model_type="planted")
    for read in (load_model, layers_of):
        with pytest.raises(ValueError, match="comes with code of its own, which is not run here.*lofit_fast.patch"):
            read(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("planted", [True, False])
def test_pickled_weights_are_refused(folder, tmp_path, planted):
    content = Planted(tmp_path / "ran") if planted else tiny_model("llama").state_dict()
    torch.save(content, folder / "pytorch_model.bin")
    # beside safetensors they are not looked at
    load_model(str(folder), device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="pickled ones are not read: expected model.safetensors"):
        load_model(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()
