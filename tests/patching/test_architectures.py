"""Where output projections are found, and what is said when they are not."""

import functools
import re
from types import MethodType

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import lofit_fast as lf
from lofit_fast.patching.architectures import (
    Fingerprint,
    architecture_of,
    decoder_layers,
    find_projections,
    fingerprint,
    text_config,
)
from lofit_fast.patching.families import ARCHITECTURES, GENERIC, REFUSED
from tests.patched_models import snapshot
from tests.tiny_families import tiny_config, tiny_family
from tests.tiny_models import FAMILIES, HEADS, HIDDEN, LAYERS, tiny_model


def head_dim_of(family: str) -> int:
    return 8 if family == "qwen2" else 16


def test_find_projections(family):
    model = tiny_model(family)
    found = find_projections(model)
    assert [p.layer for p in found] == list(range(LAYERS))
    for p, layer in zip(found, model.model.layers, strict=True):
        assert p.module is layer.self_attn.o_proj
        assert p.parent is layer.self_attn
        assert getattr(p.parent, p.attribute) is p.module
        assert model.get_submodule(p.name) is p.module
        assert (p.n_heads, p.head_dim) == (HEADS, head_dim_of(family))


def test_fingerprint(family):
    model = tiny_model(family)
    seen = fingerprint(model, find_projections(model))
    assert seen == Fingerprint(model.config.model_type, LAYERS, HEADS, head_dim_of(family), HIDDEN)
    assert Fingerprint(**seen.as_dict()) == seen


def test_every_family_has_its_row(family):
    row = architecture_of(tiny_model(family))
    assert row is not GENERIC
    assert ARCHITECTURES[row.model_type] is row


def test_every_row_has_its_tiny_model():
    assert {architecture_of(tiny_model(f)).model_type for f in FAMILIES} == set(ARCHITECTURES)


def test_a_family_is_exported_as_one_with_a_row(family):
    assert architecture_of(tiny_model(family)).export_as in (None, *ARCHITECTURES)


def test_find_projections_numbers_layers_not_strings():
    found = find_projections(tiny_model("llama", num_hidden_layers=11))
    assert [p.layer for p in found] == list(range(11))


def test_find_projections_in_the_bare_decoder():
    model = tiny_model("llama")
    assert [p.module for p in find_projections(model.model)] == [x.self_attn.o_proj for x in model.model.layers]


def test_find_projections_under_peft():
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["o_proj"]))
    found = find_projections(model)
    assert [p.layer for p in found] == list(range(LAYERS))
    assert all(type(p.module).__module__.startswith("peft") for p in found)
    assert fingerprint(model, found) == fingerprint(model.get_base_model(), found)


def test_other_families_are_found_by_the_generic_row():
    model = tiny_family("olmo")
    assert architecture_of(model) is GENERIC
    found = [(p.layer, p.n_heads, p.head_dim) for p in find_projections(model)]
    assert found == [(layer, HEADS, 8) for layer in range(LAYERS)]


def test_text_config_is_the_decoders():
    from transformers import Gemma3Config

    class Wrapper(nn.Module):
        config = Gemma3Config()

    assert text_config(Wrapper()).model_type == "gemma3_text"


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), torch.zeros(2)])
def test_find_projections_refuses_what_is_no_model(model):
    with pytest.raises(TypeError, match="Hugging Face model with a config, got (Linear|Sequential|Tensor)"):
        find_projections(model)


def test_find_projections_says_what_it_looked_for():
    with pytest.raises(ValueError, match=r"Mamba2ForCausalLM.*'mamba2'.*'layers\.<n>\.self_attn\.o_proj'"):
        find_projections(tiny_family("mamba2"))


def test_find_projections_refuses_inputs_that_are_no_heads():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj = nn.Linear(60, HIDDEN)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj.*4 heads x 16 = 64 inputs, got Linear with 60"):
        find_projections(model)


def test_find_projections_takes_the_language_model_of_several_towers():
    model = tiny_model("llama")
    model.draft = tiny_model("llama")
    assert [p.module for p in find_projections(model)] == [x.self_attn.o_proj for x in model.model.layers]
    assert decoder_layers(model) == list(model.model.layers)


def test_find_projections_refuses_two_decoders():
    model = tiny_model("llama")
    model.model.more = nn.ModuleList(tiny_model("llama").model.layers)
    with pytest.raises(ValueError, match=r"several decoders \(model\.layers, model\.more\)"):
        find_projections(model)


def with_attention_of_its_own(forward):
    """A Llama whose layer 1 has an attention that uses its projection in this way."""
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.__class__ = type("OwnAttention", (type(attention),), {"forward": forward})
    return model


def by_weight(self, hidden_states, **kwargs):
    return nn.functional.linear(hidden_states, self.o_proj.weight), None


def by_a_method(self, hidden_states, **kwargs):
    return self.projected(hidden_states), None


def with_a_method():
    model = with_attention_of_its_own(by_a_method)
    attention = model.model.layers[1].self_attn
    type(attention).projected = lambda self, z: nn.functional.linear(z, self.o_proj.weight)
    return model


def by_a_parents_method():
    model = with_a_method()
    kind = type(model.model.layers[1].self_attn)
    forward = lambda self, *args, **kwargs: super(kind, self).forward(*args, **kwargs)  # noqa: E731
    model.model.layers[1].self_attn.__class__ = type("Heir", (kind,), {"forward": forward})
    return model


def with_a_forward_of_its_own(forward):
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = forward(attention)
    return model


def by_another_name(self, hidden_states, **kwargs):
    projection = self.o_proj
    return nn.functional.linear(hidden_states, projection.weight), None


def wrapped_by_weight(attention):
    @functools.wraps(attention.forward)
    def forward(*args, **kwargs):
        return by_weight(attention, *args, **kwargs)

    forward.__wrapped__ = by_weight
    return functools.partial(forward)


def by_torch():
    model = tiny_model("llama")
    model.model.layers[1].self_attn = nn.MultiheadAttention(HIDDEN, HEADS)
    model.model.layers[1].self_attn.o_proj = nn.Linear(HIDDEN, HIDDEN)
    return model


def slow_bloom():
    model = tiny_family("bloom")
    for layer in model.transformer.h:
        layer.self_attention.pretraining_tp, layer.self_attention.slow_but_exact = 2, True
    return model


def shared_attention():
    model = tiny_model("llama")
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    return model


def of_a_tower_alone():
    """A wrapper of which the vision tower has projections of a usual name, and the language model none."""
    model = tiny_family("gemma3")
    for layer in model.model.language_model.layers:
        layer.self_attn.unusual = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    return model


REFUSALS = {
    "by weight": (lambda: with_attention_of_its_own(by_weight), "OwnAttention multiplies by its projection's weight"),
    "by weight in a method": (with_a_method, "OwnAttention multiplies by its projection's weight"),
    "in a parent's method": (by_a_parents_method, "Heir multiplies by its projection's weight"),
    "in a forward of its own": (
        lambda: with_a_forward_of_its_own(lambda attention: MethodType(by_another_name, attention)),
        "LlamaAttention multiplies by its projection's weight",
    ),
    "in a wrapped forward": (
        lambda: with_a_forward_of_its_own(wrapped_by_weight),
        "LlamaAttention multiplies by its projection's weight",
    ),
    "by torch": (by_torch, "MultiheadAttention multiplies by its projection's weight"),
    "by weight, if so configured": (slow_bloom, "BloomAttention multiplies by its projection's weight"),
    "shared attention": (shared_attention, r"layers\.2\.self_attn\.o_proj is the very module of model\.layers\.0"),
    "of a tower alone": (of_a_tower_alone, "found none in its language model"),
    **{name: (lambda name=name: tiny_family(name), REFUSED[name]) for name in REFUSED},
}


@pytest.mark.parametrize("build, said", REFUSALS.values(), ids=REFUSALS)
def test_patch_refuses_before_anything_changes(build, said):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        lf.patch(model, lf.LofitConfig(offset="all"))
    assert snapshot(model) == before


def in_its_dtype(self, hidden_states, *args, **kwargs):
    return LlamaAttention.forward(self, hidden_states.to(self.o_proj.weight.dtype), *args, **kwargs)


def reset_parameters(self):
    nn.init.zeros_(self.o_proj.weight)


def test_code_that_asks_for_the_dtype_alone_or_fills_the_weight_is_patched():
    model = with_attention_of_its_own(in_its_dtype)
    type(model.model.layers[1].self_attn).reset_parameters = reset_parameters
    assert len(find_projections(model)) == 3


def test_code_that_only_may_use_the_weight_is_patched_where_it_does_not():
    assert len(find_projections(tiny_family("bloom"))) == 3


@pytest.mark.parametrize("name", ["evolla", "gemma4", "git", "llava", "qwen2_vl", "whisper"])
def test_find_projections_takes_the_language_model_of_a_wrapper(name):
    model = tiny_family(name)
    language = model.get_decoder()
    inside = {id(module) for module in language.modules()}
    found = find_projections(model)
    assert len(found) == 3 and all(id(p.module) in inside for p in found)
    assert not any(part in p.name for p in found for part in ("vision", "audio", "image", "protein"))


@pytest.mark.parametrize(
    "name, class_name, places",
    [
        ("t5", "T5ForConditionalGeneration", r"decoder\.block\.\d\.layer\.0\.SelfAttention\.o"),
        ("whisper", "WhisperForConditionalGeneration", r"model\.decoder\.layers\.\d\.self_attn\.out_proj"),
        ("bart", "BartForConditionalGeneration", r"model\.decoder\.layers\.\d\.self_attn\.out_proj"),
    ],
)
def test_find_projections_takes_the_decoders_self_attention(name, class_name, places):
    import transformers

    changes = (
        {"d_kv": 8, "d_model": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4} if name == "t5" else {}
    )
    model = getattr(transformers, class_name)(tiny_config(name, **changes))
    found = find_projections(model)
    assert len(found) == 3 and all(re.fullmatch(places, p.name) for p in found)


def test_heads_and_widths_may_differ_by_layer():
    found = find_projections(tiny_family("gemma4_text"))
    assert [(p.n_heads, p.head_dim) for p in found] == [(4, 16), (4, 24), (4, 16), (4, 24)]
    assert fingerprint(tiny_family("gemma4_text"), found).head_dim == (16, 24, 16, 24)


def per_layer(widths):
    """A Gemma 4 whose layers have these widths of heads."""
    from transformers import Gemma4ForCausalLM

    kinds = ["full_attention" if width != 16 else "sliding_attention" for width in widths]
    config = tiny_config("gemma4_text", num_hidden_layers=3, layer_types=kinds, global_head_dim=24)
    torch.manual_seed(0)
    return Gemma4ForCausalLM(config).eval()


def test_an_adapter_of_a_model_that_differs_in_later_layers_is_refused(tmp_path):
    lf.patch(per_layer([16, 16, 24]), lf.LofitConfig(offset=[(0, 1)])).save(tmp_path / "adapter")
    other = per_layer([16, 24, 24])
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"made for .*\(16, 16, 24\).*this model is .*\(16, 24, 24\)"):
        lf.load(other, tmp_path / "adapter")
    assert snapshot(other) == before


def test_heads_may_differ_by_layer():
    from transformers import LagunaForCausalLM

    config = tiny_config("laguna", num_attention_heads_per_layer=[4, 2, 4])
    found = find_projections(LagunaForCausalLM(config))
    assert [(p.n_heads, p.head_dim) for p in found] == [(4, 16), (2, 16), (4, 16)]
