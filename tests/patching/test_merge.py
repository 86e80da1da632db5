"""Merging and exporting: plain models that compute what the patched one computes, or a refusal that changes nothing."""

import json
from itertools import product

import pytest
import torch
from torch import nn

from lofit_fast import LofitConfig, export, handle_of, patch, verify_export
from lofit_fast.patching.merge import merged_tensors
from lofit_fast.patching.verify import TOLERANCE
from tests.oracle import randomize
from tests.ordinary_sample import slow_if
from tests.patched_models import SOME, logits, relative, snapshot
from tests.tiny_families import tiny_family
from tests.tiny_models import FAMILIES, tiny_model

CONFIGS = {
    "scale": LofitConfig(scale="all"),
    "offset": LofitConfig(offset=SOME),
    "both": LofitConfig(scale=[(0, 0), (1, 1), (1, 2)], offset=SOME),
}


def patched(model, config="both"):
    handle = patch(model, CONFIGS[config])
    # to its own dtype: vectors of a float64 model are float64
    model.to(model.dtype)
    randomize(handle)
    return handle


def reload(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def both_or_llama(families, *axes):
    """All combinations with a config. In the ordinary run a Llama has every config, the others both vectors at once."""
    rows = list(product(families, *axes, CONFIGS))
    return slow_if(lambda family, *rest: family != "llama" and rest[-1] != "both", rows)


@pytest.mark.parametrize("family, dtype, config", both_or_llama(FAMILIES, [torch.float32, torch.float64]))
def test_merge_computes_the_same(family, dtype, config):
    model = tiny_model(family, dtype)
    base = logits(model)
    handle = patched(model, config)
    expected = logits(model)
    assert handle.merge() is model
    assert relative(logits(model), expected) < TOLERANCE[dtype]
    assert relative(base, expected) > 1e-3


def test_tolerances_are_the_stated_ones():
    assert (TOLERANCE[torch.float32], TOLERANCE[torch.float64]) == (1e-5, 1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_merged_tensors_are_the_formula(bias):
    model = tiny_model("llama", torch.float64, attention_bias=bias)
    handle = patched(model)
    layer = handle.layers[1]
    if bias:
        nn.init.normal_(layer.inner.bias)
    a, v = torch.zeros(2, 4, 16, dtype=torch.float64)
    a[[1, 2]], v[[0, 3]] = layer.scale.detach(), layer.offset.detach()
    weight, b = merged_tensors(layer)
    torch.testing.assert_close(weight, layer.weight * (1 + a.view(-1)))
    torch.testing.assert_close(b, layer.weight @ v.view(-1) + (layer.bias if bias else 0))


def test_merge_leaves_a_plain_model(family):
    model = tiny_model(family)
    modules = [(name, id(m)) for name, m in model.named_modules()]
    handle = patched(model, "both")
    handle.merge()
    assert [(name, id(m)) for name, m in model.named_modules()] == modules
    assert handle_of(model) is None
    assert all(type(layer.self_attn.o_proj) is nn.Linear for layer in model.model.layers)
    for end in (handle.merge, handle.unpatch):
        with pytest.raises(ValueError, match="this handle has ended"):
            end()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_merge_leaves_parameters_as_trainable_as_they_were(bias, trainable):
    model = tiny_model("llama", attention_bias=bias).requires_grad_(trainable)
    patched(model, "both").merge()
    assert {p.requires_grad for p in model.parameters()} == {trainable}


@pytest.mark.parametrize("family, config", both_or_llama(["llama", "gemma", "gemma2", "gemma3", "qwen3"]))
def test_merged_model_saves_and_reloads(family, config, tmp_path):
    model = tiny_model(family)
    handle = patched(model, config)
    expected = logits(model)
    handle.merge().save_pretrained(tmp_path)
    assert relative(logits(reload(tmp_path)), expected) < 1e-5
    assert model.config.attention_bias == (config != "scale")


def test_merged_state_dict_is_rounded_once():
    wide, narrow = tiny_model("llama", torch.bfloat16).float(), tiny_model("llama", torch.bfloat16)
    for model in (wide, narrow):
        patched(model, "both").merge()
    for a, b in zip(wide.model.layers, narrow.model.layers, strict=True):
        assert torch.equal(a.self_attn.o_proj.weight.bfloat16(), b.self_attn.o_proj.weight)
        assert torch.equal(a.self_attn.o_proj.bias.bfloat16(), b.self_attn.o_proj.bias)


def test_merge_inside_autocast_is_as_outside():
    merged = []
    for inside in (False, True):
        model = tiny_model("llama")
        handle = patched(model, "both")
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            handle.merge()
        merged.append(model.state_dict())
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


class Quantized(nn.Linear):
    """A linear with a forward of its own."""


def test_merge_of_what_is_not_plain_is_refused(llama):
    o_proj = llama.model.layers[1].self_attn.o_proj
    o_proj.__class__ = Quantized
    handle = patched(llama, "both")
    before = snapshot(llama)
    with pytest.raises(ValueError, match="cannot merge layer 1: expected a plain nn.Linear, got Quantized"):
        handle.merge()
    assert snapshot(llama) == before
    assert handle_of(llama) is handle


def with_lora(target: str):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(11)
    adapter = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    return get_peft_model(tiny_model("llama"), adapter).eval()


@pytest.mark.parametrize("target, action", [("o_proj", "merge"), ("o_proj", "export"), ("q_proj", "export")])
def test_merge_of_a_lora_model_is_refused(target, action, tmp_path):
    model = with_lora(target)
    handle = patched(model, "both")
    before, expected = snapshot(model), logits(model)
    with pytest.raises(ValueError, match="cannot (merge|export)"):
        handle.merge() if action == "merge" else export(handle, tmp_path / "out")
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)
    assert handle_of(model) is handle
    assert list(tmp_path.iterdir()) == []


# the projections are plain, so merging is possible; half of it is not
def test_merge_beside_a_lora_elsewhere_is_whole_or_refused():
    model = with_lora("q_proj")
    handle = patched(model, "both")
    before, expected = snapshot(model), logits(model)
    try:
        handle.merge()
    except ValueError:
        assert snapshot(model) == before
    assert relative(logits(model), expected) < 1e-5


def test_merge_beside_a_lora_that_needs_no_bias():
    model = with_lora("up_proj")
    handle = patched(model, "both")
    expected = logits(model)
    assert relative(logits(handle.merge()), expected) < 1e-5
    plain = model.get_base_model()
    assert plain.config.attention_bias
    assert not any(layer.self_attn.q_proj.bias.any() for layer in plain.model.layers)


def test_merge_under_a_wrapped_head():
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model("llama", tie_word_embeddings=True), config).eval()
    handle = patched(model, "both")
    expected = logits(model)
    assert relative(logits(handle.merge()), expected) < 1e-5


def test_merge_of_another_family():
    model = tiny_family("olmo")
    handle = patch(model, LofitConfig(scale="all", offset="all"))
    randomize(handle)
    expected = logits(model)
    assert relative(logits(handle.merge()), expected) < 1e-5


@pytest.mark.parametrize("family, config", both_or_llama(FAMILIES))
def test_export_reloads_and_computes_the_same(family, config, tmp_path):
    model = tiny_model(family)
    handle = patched(model, config)
    before, expected = snapshot(model), logits(model)
    assert export(handle, tmp_path) == tmp_path
    assert relative(logits(reload(tmp_path)), expected) < 1e-5
    # the handle lives on
    assert snapshot(model) == before
    assert handle_of(model) is handle
    report = verify_export(handle, tmp_path)
    assert report.difference < report.tolerance == 1e-5
    assert report.base_difference > 1e-3
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_export_in_bfloat16(family, tmp_path):
    handle = patched(tiny_model(family, torch.bfloat16), "both")
    export(handle, tmp_path)
    report = verify_export(handle, tmp_path)
    assert report.difference < report.tolerance == TOLERANCE[torch.bfloat16]
    assert report.base_difference > report.tolerance


def test_export_of_an_existing_bias(tmp_path):
    model = tiny_model("llama", attention_bias=True)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            nn.init.normal_(getattr(layer.self_attn, name).bias)
    handle = patched(model, "both")
    export(handle, tmp_path)
    assert verify_export(handle, tmp_path).difference < 1e-5


@pytest.mark.parametrize("family, written", [("mistral", "llama"), ("qwen2", "llama"), ("gemma2", "gemma2")])
def test_export_says_which_family_it_is(family, written, tmp_path):
    export(patched(tiny_model(family), "offset"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["attention_bias"]) == (written, True)


def test_export_of_scales_keeps_the_family(tmp_path):
    export(patched(tiny_model("mistral"), "scale"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mistral"


def test_export_equals_merge(tmp_path):
    handle = patched(tiny_model("llama"), "both")
    export(handle, tmp_path)
    exported, merged = reload(tmp_path).state_dict(), handle.merge().state_dict()
    assert exported.keys() == merged.keys()
    assert all(torch.equal(exported[key], merged[key]) for key in merged)


def test_export_keeps_the_generation_config(tmp_path):
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 7
    export(patched(model, "both"), tmp_path)
    assert reload(tmp_path).generation_config.max_new_tokens == 7


def refuses_export(handle, folder, message: str) -> None:
    before = snapshot(handle.model)
    with pytest.raises(ValueError, match=message):
        export(handle, folder)
    assert not folder.exists()
    assert snapshot(handle.model) == before
    assert handle_of(handle.model) is handle


def test_export_of_a_sliding_window_as_llama_is_refused(tmp_path):
    handle = patched(tiny_model("mistral", sliding_window=8), "offset")
    refuses_export(handle, tmp_path / "out", "cannot export mistral as llama: its attention slides over 8 tokens of 64")


@pytest.mark.parametrize("window", [64, 128])
def test_export_of_a_window_as_long_as_the_context_goes_through(tmp_path, window):
    handle = patched(tiny_model("mistral", sliding_window=window), "offset")
    export(handle, tmp_path)
    assert verify_export(handle, tmp_path).difference < 1e-5


def test_export_of_scales_under_a_sliding_window(tmp_path):
    handle = patched(tiny_model("mistral", sliding_window=8), "scale")
    export(handle, tmp_path)
    assert verify_export(handle, tmp_path).difference < 1e-5


def test_export_of_offsets_in_another_family(tmp_path):
    handle = patch(tiny_family("olmo"), LofitConfig(offset="all"))
    randomize(handle)
    export(handle, tmp_path)
    assert verify_export(handle, tmp_path).difference < 1e-5


def test_export_of_scales_in_another_family(tmp_path):
    handle = patch(tiny_family("olmo"), LofitConfig(scale="all"))
    randomize(handle)
    export(handle, tmp_path)
    assert verify_export(handle, tmp_path).difference < 1e-5


def test_export_that_fails_to_write_leaves_nothing(tmp_path, monkeypatch):
    handle = patched(tiny_model("llama"), "both")

    def fail(self, folder, **kwargs):
        (folder / "config.json").write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(type(handle.model), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        export(handle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_into_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to output folder .*file"):
        export(patched(tiny_model("llama"), "both"), tmp_path / "file" / "out")


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_verify_export_catches_a_config_that_drops_the_biases(family, tmp_path):
    handle = patched(tiny_model(family), "offset")
    export(handle, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["attention_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = snapshot(handle.model)
    with pytest.raises(ValueError, match="does not compute what the patched one does"):
        verify_export(handle, tmp_path)
    assert snapshot(handle.model) == before


def test_verify_export_catches_the_base_model(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    handle = patched(model, "scale")
    with pytest.raises(ValueError, match="does not compute what the patched one does"):
        verify_export(handle, tmp_path)


@pytest.mark.parametrize("training", [False, True])
def test_verify_export_keeps_the_training_mode(tmp_path, training):
    model = tiny_model("llama", attention_dropout=0.5)
    handle = patched(model, "both")
    export(handle, tmp_path)
    model.train(training)
    model.model.layers[1].eval()
    before = snapshot(model)
    assert verify_export(handle, tmp_path).difference < 1e-5
    assert snapshot(model) == before
