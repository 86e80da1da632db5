"""Where output projections are found, and what is said when they are not."""

import pytest
import torch
from torch import nn

from lofit_fast.patching.architectures import (
    Fingerprint,
    architecture_of,
    decoder_layers,
    find_projections,
    fingerprint,
    text_config,
)
from lofit_fast.patching.families import ARCHITECTURES, GENERIC
from tests.tiny_models import FAMILIES, HEADS, HIDDEN, LAYERS, tiny_model


def head_dim_of(family: str) -> int:
    return 8 if family == "qwen2" else 16


def other_family():
    """A model of a family without a row, with a linear called o_proj."""
    from transformers import OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=2,
    )
    return OlmoForCausalLM(config).eval()


def without_attention():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(Mamba2Config(vocab_size=97, hidden_size=8, num_hidden_layers=1, num_heads=2, head_dim=8))


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


def test_find_projections_numbers_layers_not_strings():
    found = find_projections(tiny_model("llama", num_hidden_layers=11))
    assert [p.layer for p in found] == list(range(11))


def test_find_projections_in_the_bare_decoder():
    model = tiny_model("llama")
    assert [p.module for p in find_projections(model.model)] == [x.self_attn.o_proj for x in model.model.layers]


def test_find_projections_under_peft():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["o_proj"]))
    found = find_projections(model)
    assert [p.layer for p in found] == list(range(LAYERS))
    assert all(type(p.module).__module__.startswith("peft") for p in found)
    assert fingerprint(model, found) == fingerprint(model.get_base_model(), found)


def test_other_families_are_found_by_the_generic_row():
    model = other_family()
    assert architecture_of(model) is GENERIC
    assert [(p.layer, p.n_heads, p.head_dim) for p in find_projections(model)] == [(0, 4, 8), (1, 4, 8)]


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
        find_projections(without_attention())


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


def test_find_projections_refuses_a_projection_that_is_never_called():
    model = tiny_model("llama")
    model.model.layers[1].self_attn = nn.MultiheadAttention(HIDDEN, HEADS)
    model.model.layers[1].self_attn.o_proj = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match="never calls its projection"):
        find_projections(model)
