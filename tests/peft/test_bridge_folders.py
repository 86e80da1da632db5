"""Folders of LoFiT that PEFT, transformers and we write: read by each, and damage noticed."""

import json
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("peft")
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM

import lofit_fast as lf
from lofit_fast.patching.storage import PEFT_TYPE
from lofit_fast.peft import LofitPeftLayer
from tests.patched_models import CONFIGS, logits
from tests.peft.bridge_models import adapted, peft_config, spoilt, twin_of
from tests.peft.peft_models import fill
from tests.tiny_models import tiny_model


def test_the_two_folders_are_one(tmp_path):
    model = adapted()
    fill(model)
    on = logits(model)
    model.save_pretrained(tmp_path / "peft")
    handle = lf.load(tiny_model("llama"), tmp_path / "peft")
    assert torch.equal(logits(handle.model), on)
    handle.save(tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours").eval()
    assert torch.equal(logits(again), on)
    assert again.peft_config["default"].heads() == CONFIGS["both"]
    written = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    assert all(written[1][key] == value for key, value in written[0].items() if key != "base_model_name_or_path")


def flip(path, at=-5):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


# transformers' own load_adapter reads the tensors by itself, and asks nobody
LOADERS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_model("llama"), folder),
    "load_adapter": lambda folder: adapted().load_adapter(folder, "second"),
    "lofit_fast": lambda folder: lf.load(tiny_model("llama"), folder),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("writer", ["handle", "peft"])
def test_a_flipped_bit_is_noticed_whoever_writes_and_reads(writer, loader, tmp_path):
    model = adapted()
    fill(model)
    model.save_pretrained(tmp_path) if writer == "peft" else twin_of(model).save(tmp_path)
    LOADERS[loader](tmp_path)
    flip(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        LOADERS[loader](tmp_path)


def test_a_config_that_was_damaged_is_noticed(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    content["offset"][0][1] ^= 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged, or was changed by hand"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_folders_without_digests_load_and_numbers_that_are_not_finite_do_not(tmp_path):
    model = adapted()
    fill(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if "digest" not in k}
    path.write_text(json.dumps(content))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()), logits(model))
    spoilt(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has numbers that are not finite"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_the_digests_of_a_folder_that_was_read_are_not_written_again(tmp_path):
    model = adapted()
    fill(model)
    model.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "first", is_trainable=True)
    fill(again, seed=9)
    again.save_pretrained(tmp_path / "second")
    got = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "second").eval()
    assert torch.equal(logits(got), logits(again.eval()))
    # a config alone says nothing of tensors
    again.peft_config["default"].save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config" / "adapter_config.json").read_text())["tensor_digest"] is None


def test_an_adapter_whose_save_was_killed_before_its_config_is_the_new_one(tmp_path):
    for name, seed in (("old", 1), ("new", 2)):
        handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(seed, seed)]))
        fill(handle.model, seed=seed)
        handle.save(tmp_path / name)
    (tmp_path / "new" / "adapter_model.safetensors").replace(tmp_path / "old" / "adapter_model.safetensors")
    got = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "old").eval()
    assert got.peft_config["default"].offset == ((2, 2),)
    assert torch.equal(logits(got), logits(handle.model))


def test_another_base_is_a_warning(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was trained on other weights than this model has"):
        PeftModel.from_pretrained(tiny_model("llama", seed=4), tmp_path)


@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_into_16_bits_rounds_nothing(tmp_path, low_memory):
    model = adapted(dtype=torch.bfloat16)
    fill(model)
    model.save_pretrained(tmp_path)
    base = tiny_model("llama", torch.bfloat16)
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(logits(again), logits(model))


def saved_base(folder) -> nn.Module:
    tiny_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# what a user tries first, on either folder
@pytest.mark.parametrize("writer", ["handle", "peft"])
def test_transformers_loads_the_folder(writer, tmp_path):
    base = saved_base(tmp_path / "base")
    if writer == "handle":
        handle = lf.patch(base, CONFIGS["both"])
        fill(base)
        handle.save(tmp_path / "adapter")
        model = base
    else:
        model = get_peft_model(base, peft_config("both"))
        fill(model)
        model.save_pretrained(tmp_path / "adapter")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(got), logits(model))
    assert isinstance(got.model.layers[1].self_attn.o_proj, LofitPeftLayer)


UNREGISTERED = """
import sys, peft, lofit_fast, transformers
assert "LOFIT" not in peft.PeftType.__members__
for load in (transformers.AutoModelForCausalLM.from_pretrained, peft.PeftConfig.from_pretrained):
    try:
        load(sys.argv[1])
    except KeyError as error:
        print(error)
"""


MESSAGE = r"lofit_fast\.load\(model, folder\), or import lofit_fast\.peft"


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, PeftConfig.from_pretrained])
def test_without_the_bridge_the_error_says_what_to_do(load, tmp_path, monkeypatch):
    base = saved_base(tmp_path / "base")
    lf.patch(base, CONFIGS["both"]).save(tmp_path / "adapter")
    for name in ("LOFIT", PEFT_TYPE):
        monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, name)
    with pytest.raises(KeyError, match=MESSAGE):
        load(tmp_path / "adapter")


@pytest.mark.slow
def test_importing_lofit_fast_registers_nothing(tmp_path):
    base = saved_base(tmp_path / "base")
    lf.patch(base, CONFIGS["both"]).save(tmp_path / "adapter")
    command = [sys.executable, "-c", UNREGISTERED, str(tmp_path / "adapter")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(shown) == 2
    assert all(re.search(MESSAGE, line) for line in shown)
