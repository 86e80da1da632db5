"""Exports of models that are not a plain causal language model with tied or untied embeddings of its config's word."""

import json

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.patching.verify import check_export
from tests.oracle import randomize
from tests.patched_models import logits, relative, snapshot
from tests.tiny_models import tiny_model

BOTH = lf.LofitConfig(scale="all", offset="all")


def patched(model):
    handle = lf.patch(model, BOTH)
    randomize(handle)
    return handle


def diverged(dtype=torch.float32, family="llama"):
    """The config says tied; the head is another tensor."""
    model = tiny_model(family, dtype, tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5 + 0.1)
    return model


def equal_apart():
    """The config says tied; the head is another tensor of the same numbers."""
    model = tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def shared_unsaid():
    """The config says untied; the head is the embeddings."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


# (model, what the exported config says)
TIES = {
    "tied": (lambda: tiny_model("gemma", tie_word_embeddings=True), True),
    "diverged": (diverged, False),
    "diverged, bfloat16": (lambda: diverged(torch.bfloat16), False),
    "diverged, as llama": (lambda: diverged(family="qwen2"), False),
    "equal apart": (equal_apart, True),
    "shared unsaid": (shared_unsaid, False),
}


@pytest.mark.parametrize("case", TIES)
def test_ties_are_exported_as_they_are(case, tmp_path):
    make, tied = TIES[case]
    handle = patched(make())
    before = snapshot(handle.model)
    lf.export(handle, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
    report = lf.verify_export(handle, tmp_path)
    assert report.difference <= report.tolerance
    assert snapshot(handle.model) == before


@pytest.mark.parametrize("case", [case for case in TIES if "llama" not in case])
def test_ties_are_merged_as_they_are(case, tmp_path):
    model = TIES[case][0]()
    handle = patched(model)
    expected = logits(model)
    handle.merge().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert relative(logits(again), expected) < (1e-5 if model.dtype == torch.float32 else 4e-2)


# a head of another class, and none
HEADLESS = {
    "classifier": ("LlamaForSequenceClassification", "llama", {}),
    "classifier of tokens": ("LlamaForTokenClassification", "llama", {}),
    "answers": ("LlamaForQuestionAnswering", "llama", {}),
    "bare": ("LlamaModel", "llama", {}),
    "classifier, as llama": ("MistralForSequenceClassification", "mistral", {}),
    "bare, as llama": ("Qwen2Model", "qwen2", {}),
    "classifier with padding": ("GemmaForSequenceClassification", "gemma", {"pad_token_id": 0}),
}


@pytest.mark.parametrize("case", HEADLESS)
def test_models_with_another_head_export_as_their_class(case, tmp_path):
    import transformers

    name, family, changes = HEADLESS[case]
    config = tiny_model(family, **{"pad_token_id": None, **changes}).config
    torch.manual_seed(0)
    handle = patched(getattr(transformers, name)(config).eval())
    lf.export(handle, tmp_path)
    report = lf.verify_export(handle, tmp_path)
    assert report.difference < 1e-5 < report.base_difference
    expected = name.replace("Mistral", "Llama").replace("Qwen2", "Llama") if "as llama" in case else name
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [expected]


def test_a_kin_without_the_head_is_refused(tmp_path, monkeypatch):
    import transformers

    class MistralForPoems(transformers.MistralForCausalLM):
        """A head that Llama does not have."""

    handle = patched(MistralForPoems(tiny_model("mistral").config).eval())
    with pytest.raises(ValueError, match="cannot export a MistralForPoems as llama: there is no LlamaForPoems"):
        lf.export(handle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_several_dtypes_keep_theirs(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    model.lm_head.float()
    model.model.norm.float()
    model.model.layers[1].self_attn.o_proj.float()
    handle = patched(model)
    lf.export(handle, tmp_path)
    check_export(handle, tmp_path)
    merged = handle.merge()
    assert merged.model.layers[1].self_attn.o_proj.bias.dtype == torch.float32
    assert merged.model.layers[0].self_attn.o_proj.bias.dtype == torch.bfloat16
    assert merged.model.layers[1].self_attn.q_proj.bias.dtype == torch.bfloat16


def test_a_generation_config_that_stock_code_would_not_write_is_kept(tmp_path):
    model = tiny_model("llama")
    # as older checkpoints have it: read with a warning
    model.generation_config.update(temperature=0.7, do_sample=False, max_new_tokens=5)
    handle = patched(model)
    lf.export(handle, tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert (written["temperature"], written["max_new_tokens"]) == (0.7, 5)
    assert type(model).from_pretrained(tmp_path).generation_config.to_dict() == model.generation_config.to_dict()
