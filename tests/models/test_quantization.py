"""Loading in fewer bits, and folders that are quantized already."""

import importlib.util

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.models.quantization import QUANTIZERS, quantizer_of
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    # sizes of whole groups of 64 weights, which bitsandbytes asks for where it computes in AVX-512 bfloat16
    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("bits", QUANTIZERS)
def test_quantized_while_loading_and_loaded_again(package, bits, folder, tmp_path, monkeypatch):
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setitem(QUANTIZERS, bits, tuple(row for row in QUANTIZERS[bits] if row.package == package))
    model, _ = lf.load_model(str(folder), quantization=bits, dtype="float32", device="cpu")
    projection = model.model.layers[0].self_attn.o_proj
    assert type(projection) is not nn.Linear or type(projection.weight) is not nn.Parameter
    assert not model.training and model.is_quantized
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again, _ = lf.load_model(str(tmp_path), dtype="float32", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="is quantized already: expected quantization=None, got 'int4'"):
        lf.load_model(str(tmp_path), quantization="int4")


def test_unknown_quantization(folder):
    with pytest.raises(ValueError, match="unknown quantization 'int3': expected None or one of int8, int4"):
        lf.load_model(str(folder), quantization="int3")


def test_nothing_installed_to_quantize_with(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes or torchao: pip install .*quantized"):
        quantizer_of("int4")
