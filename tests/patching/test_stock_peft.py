"""Offsets as an adapter of stock PEFT, loaded where this library is not imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
import torch
from peft import PeftModel

import lofit_fast as lf
from lofit_fast.patching.verify import verify_peft
from tests.oracle import randomize
from tests.patched_models import snapshot
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
]
ROOT = Path(__file__).parents[2]
OFFSETS = lf.LofitConfig(offset=[(0, 1), (2, 0), (2, 3)])
STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
assert not any(name.startswith("lofit") for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.load(ids, weights_only=True)).logits, out)
"""


def patched(model, config=OFFSETS):
    handle = lf.patch(model, config)
    randomize(handle)
    return handle


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


@pytest.mark.parametrize(("family", "method"), [("llama", "beft"), ("qwen3", "lora")])
def test_stock_peft_computes_the_same(tmp_path, family, method):
    computes_the_same(tmp_path, family, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["beft", "lora"])
@pytest.mark.parametrize("family", ["mistral", "gemma", "gemma3", "qwen2", "llama biased", "granite"])
def test_stock_peft_computes_more_families_the_same(tmp_path, family, method):
    computes_the_same(tmp_path, family, method)


def computes_the_same(tmp_path, family, method):
    handle = patched(tiny_family(family))
    before = snapshot(handle.model)
    lf.export(handle, tmp_path, target="peft", peft_method=method)
    assert snapshot(handle.model) == before
    loaded = PeftModel.from_pretrained(tiny_family(family), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(handle.model), rtol=0, atol=1e-5)
    report = verify_peft(handle, tmp_path)
    assert report.difference < 1e-5 < report.effects["offset"]
    assert snapshot(handle.model) == before
    with loaded.disable_adapter():
        assert logits(loaded).equal(logits(tiny_family(family)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["beft", "lora"])
def test_where_this_library_is_not_imported(tmp_path, method):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    handle = patched(tiny_model("llama"))
    lf.export(handle, tmp_path / "adapter", target="peft", peft_method=method)
    torch.save(tokens(), tmp_path / "ids.pt")
    files = [str(tmp_path / name) for name in ("base", "adapter", "ids.pt", "out.pt")]
    done = subprocess.run([sys.executable, "-c", STOCK, *files], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(handle.model), rtol=0, atol=1e-5)


def test_a_projection_that_is_transposed(tmp_path):
    handle = patched(tiny_family("gpt2"))
    with pytest.raises(ValueError, match="takes nn.Linear only.*peft_method='lora'"):
        lf.export(handle, tmp_path / "out", target="peft")
    lf.export(handle, tmp_path / "out", target="peft", peft_method="lora")
    loaded = PeftModel.from_pretrained(tiny_family("gpt2"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(handle.model), rtol=0, atol=1e-5)


def test_a_model_in_16_bits(tmp_path):
    handle = patched(tiny_model("llama", torch.bfloat16))
    lf.export(handle, tmp_path, target="peft")
    assert verify_peft(handle, tmp_path).difference < 1e-5


def test_what_is_refused(tmp_path):
    handle, out = patched(tiny_model("llama")), tmp_path / "out"
    with pytest.raises(ValueError, match="peft_method to be one of beft, lora, got 'loha'"):
        lf.export(handle, out, target="peft", peft_method="loha")
    with pytest.raises(ValueError, match="peft_method is for target='peft', got target='transformers'"):
        lf.export(handle, out, peft_method="lora")
    handle.save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter that lofit_fast.export has not written"):
        lf.export(handle, tmp_path / "adapter", target="peft")
    with pytest.raises(ValueError, match=r"cannot export scales for PEFT \(layer 0"):
        lf.export(patched(tiny_model("llama"), lf.LofitConfig(scale="all", offset="all")), out, target="peft")
    with pytest.raises(ValueError, match="answers alone"):
        answers = lf.LofitConfig(offset="all", positions="answer")
        lf.export(lf.patch(tiny_model("llama"), answers), out, target="peft")
    assert not out.exists()


def test_an_adapter_without_effect_on_these_inputs_is_no_proof(tmp_path):
    handle = lf.patch(tiny_model("llama"), OFFSETS)
    randomize(handle, std=1e-20)
    lf.export(handle, tmp_path, target="peft")
    with pytest.raises(ValueError, match="inconclusive: leaving out the offsets .*on which the adapter has an effect"):
        verify_peft(handle, tmp_path)


def test_a_damaged_folder_is_noticed(tmp_path):
    handle = patched(tiny_model("llama"))
    lf.export(handle, tmp_path, target="peft", peft_method="lora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2}))
    with pytest.raises(ValueError, match="does not compute in PEFT what the patched model does"):
        verify_peft(handle, tmp_path)


def test_of_several_adapters_the_handles_own_is_written_where_it_is_active(tmp_path):
    handle = patched(tiny_model("llama"))
    expected = logits(handle.model)
    # in a layer that the handle's own leaves alone
    handle.add("other", lf.LofitConfig(offset=[(1, 2)], init_std=0.5))
    lf.export(handle, tmp_path / "own", target="peft")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "own").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    handle.set_active("other")
    for target in ("peft", "llama.cpp", "transformers"):
        with pytest.raises(ValueError, match="cannot export while 'other' is active"):
            lf.export(handle, tmp_path / target, target=target)
        assert not (tmp_path / target).exists()
