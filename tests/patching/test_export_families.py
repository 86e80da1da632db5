"""Which families export offsets: all those of the table of tiny models whose stock code can have the bias."""

import warnings

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching.verify import TOLERANCE
from tests.oracle import randomize
from tests.patched_models import relative, snapshot
from tests.tiny_families import tiny_family
from tests.tiny_models import tokens

# one for each way to a bias: a switch of each name, biases elsewhere along with it, one that is there already, Conv1D,
# a linear class of the family's own, a kin's code, a wrapper's text part, and experts whose tensors are renamed on disk
EXPORTED = (
    "granite",
    "qwen3_moe",
    "seed_oss",
    "ernie4_5_moe",
    "starcoder2",
    "falcon",
    "internlm3",
    "gpt2",
    "openai-gpt",
    "gpt_neox",
    "qwen2",
    "paligemma",
    "got_ocr2",
    "bart",
)
MORE_EXPORTED = (
    *("afmoe", "apertus", "arcee", "aria_text", "axk1", "bamba", "beam", "biogpt", "bitnet", "blenderbot", "bloom"),
    *("cohere", "cohere2", "cohere2_moe", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "emu3"),
    *("ernie4_5", "falcon_h1", "flex_olmo", "flint", "gemma3n_text", "glm4_moe_lite", "glm_moe_dsa", "gpt_bigcode"),
    *("gpt_oss", "granite_swa", "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "hyperclovax", "jais2", "laguna", "lfm3", "llama biased", "llama tied", "llama4_text"),
    *("marian", "mbart", "mellum", "minicpm3", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid"),
    *("olmoe", "opt", "pegasus", "persimmon", "phi", "phimoe", "plbart", "prophetnet", "qwen3_5_text", "qwen3_next"),
    *("smollm3", "trocr", "vaultgemma", "whisper", "xglm", "youtu", "zaya"),
    *("llava", "gemma3", "llama4", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "aya_vision", "qwen2_audio", "voxtral"),
)
# exported for another family's code, which a model in memory does not change to
AS_KIN = ("qwen2", "got_ocr2", "qwen2_audio")
# no switch known: (family, what the refusal says)
REFUSED = {
    "mixtral": "no switch known here gives its code a bias on the output projection",
    "phi3": "no switch known here",
    "stablelm": "no switch known here",
    "qwen2_vl": "model_type 'qwen2_vl_text': no switch known here",
    "qwen2 sliding": "cannot export qwen2 as llama: its attention slides over 8 tokens of 64",
    "mistral3": "cannot export mistral as llama: its attention slides",
}


def patched(name, config="both", dtype=torch.float32):
    both = lf.LofitConfig(scale="all", offset="all")
    handle = lf.patch(tiny_family(name, dtype), both if config == "both" else lf.LofitConfig(scale="all"))
    randomize(handle)
    return handle


def logits(model):
    ids = tokens()
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def exports(name, folder):
    handle = patched(name)
    before = snapshot(handle.model)
    lf.export(handle, folder)
    report = lf.verify_export(handle, folder)
    assert report.difference < report.tolerance == TOLERANCE[torch.float32]
    assert min(report.effects["scale"], report.effects["offset"]) > 1e-3
    assert snapshot(handle.model) == before


def merges(name, folder):
    handle = patched(name)
    expected = logits(handle.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = handle.merge()
    assert relative(logits(model), expected) < 1e-5
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative(logits(again.eval()), expected) < 1e-5


@pytest.mark.parametrize("name", EXPORTED)
def test_families_export_their_offsets(name, tmp_path):
    exports(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_EXPORTED)
def test_more_families_export_their_offsets(name, tmp_path):
    exports(name, tmp_path)


@pytest.mark.parametrize("name", [name for name in EXPORTED if name not in AS_KIN])
def test_merged_families_save_and_reload(name, tmp_path):
    merges(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MORE_EXPORTED if name not in AS_KIN])
def test_more_merged_families_save_and_reload(name, tmp_path):
    merges(name, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_families_without_a_switch_refuse_offsets_and_export_scales(name, tmp_path):
    handle = patched(name)
    before = snapshot(handle.model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        lf.export(handle, tmp_path / "offsets")
    assert snapshot(handle.model) == before
    assert lf.handle_of(handle.model) is handle
    assert list(tmp_path.iterdir()) == []
    handle.unpatch()
    handle = lf.patch(handle.model, lf.LofitConfig(scale="all"))
    randomize(handle)
    lf.export(handle, tmp_path)
    assert lf.verify_export(handle, tmp_path).difference < 1e-5


@pytest.mark.parametrize("name", ["granite", "gpt2", "paligemma"])
def test_families_export_in_bfloat16(name, tmp_path):
    handle = patched(name, dtype=torch.bfloat16)
    lf.export(handle, tmp_path)
    report = lf.verify_export(handle, tmp_path)
    assert report.difference < report.tolerance == TOLERANCE[torch.bfloat16]
