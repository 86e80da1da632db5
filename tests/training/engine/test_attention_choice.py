"""Which attention training takes: a rule on the device and the family."""

from dataclasses import replace

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.pack import GROUPED
from lofit_fast.patching.architectures import find_projections, text_config
from lofit_fast.training import Engine
from lofit_fast.training.engine import attention_choice, auto
from lofit_fast.training.engine.attention_choice import (
    CANDIDATES,
    FLASH,
    Facts,
    attention_refusal,
    best_attention,
    facts_of,
)
from lofit_fast.training.engine.causal_attention import CAUSAL
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(("device", "expected"), [("cpu", GROUPED), ("cuda", CAUSAL), ("mps", "sdpa")])
def test_attention_by_device(llama, device, expected):
    assert best_attention(llama, torch.device(device)) == expected


def test_attention_of_a_family_nobody_knows(llama):
    llama.config.model_type = "unheard_of"
    assert best_attention(llama, torch.device("cpu")) == "sdpa"


def test_attention_that_a_family_needs_is_kept():
    # gemma 2 is loaded with eager attention by whoever follows its card
    model = tiny_model("gemma2")
    model.set_attn_implementation("eager")
    assert best_attention(model, torch.device("cuda")) == "eager"


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_attention_of_float64_models_may_round_to_float32(family):
    # eager attention takes its softmax in float32, whatever the model is in
    assert attention_refusal(tiny_model(family, torch.float64), "eager") is None


@pytest.mark.parametrize("name", [GROUPED, CAUSAL])
@pytest.mark.parametrize("family", ["deepseek_v32", "dots3_note_text", "minimax_m3_vl_text"])
def test_a_model_that_picks_tokens_is_refused_attentions_that_it_does_not_know(family, name):
    model = tiny_family(family)
    config = text_config(model)
    # as in real models: in a trial's rows everything is picked, and nothing differs
    for setting in ("index_topk", "index_topk_blocks"):
        if hasattr(config, setting):
            setattr(config, setting, 64)
    assert "picks what it attends to in long rows" in attention_refusal(model, name)
    assert attention_refusal(model, "eager") is None


BF16_ON_CUDA = Facts("cuda", torch.bfloat16, 64, known=True, picks=False, flash=False, packs=True)
FLASHING = replace(BF16_ON_CUDA, flash=True)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [CAUSAL]),
        ({"flash": True}, [FLASH, CAUSAL]),
        ({"flash": True, "packs": False}, [CAUSAL]),
        ({"flash": True, "dtype": torch.float32}, [CAUSAL]),
        ({"flash": True, "head_dim": 512}, [CAUSAL]),
        ({"known": False}, []),
        ({"picks": True}, []),
        ({"device": "xpu", "flash": True}, []),
        ({"device": "cpu", "flash": True, "dtype": torch.float32}, [GROUPED]),
        ({"device": "cpu", "known": False}, []),
    ],
)
def test_what_is_tried_and_in_which_order(changed, expected):
    facts = replace(BF16_ON_CUDA, **changed)
    assert [row.attention for row in CANDIDATES if row.fits(facts)] == expected


def test_facts_of_a_model(monkeypatch):
    model = tiny_model("qwen3", torch.bfloat16)
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: name == "flash_attn")
    assert facts_of(model, torch.device("cuda"), True) == replace(BF16_ON_CUDA, head_dim=16, flash=True)
    assert facts_of(tiny_family("deepseek_v32"), torch.device("cuda"), True).picks


def test_facts_of_a_model_whose_heads_differ_by_layer():
    # transformers refuses to say one head_dim of this one
    model = tiny_family("gemma4_text")
    widths = {projection.head_dim for projection in find_projections(model)}
    assert len(widths) > 1
    assert facts_of(model, torch.device("cuda"), True).head_dim == max(widths)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2
    assert auto.settle(handle, Engine(compile=False), rows, 0, 2, 1)[0].attention == "sdpa"


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_facts_of_a_model_without_heads(family):
    assert facts_of(tiny_family(family), torch.device("cuda"), True).head_dim == 0


@pytest.mark.parametrize(
    ("packing", "leaks", "expected"),
    [("auto", None, (FLASH, True)), ("auto", "it leaks", (CAUSAL, False)), (False, None, (CAUSAL, False))],
)
def test_flash_attention_is_for_packed_rows(llama, packing, leaks, expected, monkeypatch):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 4
    # as on CUDA, with flash-attn
    monkeypatch.setattr(attention_choice, "facts_of", lambda model, device, packs: replace(FLASHING, packs=packs))
    monkeypatch.setattr(attention_choice, "attention_refusal", lambda model, name: None)
    monkeypatch.setattr(auto, "packing_leak", lambda *_: leaks)
    settled, _ = auto.settle(handle, Engine(packing=packing, narrow=False), rows, 0, 2, 1)
    assert (settled.attention, settled.packing) == expected


def test_packing_that_leaks_is_refused_where_it_was_asked_for(llama, monkeypatch):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    monkeypatch.setattr(attention_choice, "facts_of", lambda model, device, packs: replace(FLASHING, packs=packs))
    monkeypatch.setattr(attention_choice, "attention_refusal", lambda model, name: None)
    monkeypatch.setattr(auto, "packing_leak", lambda *_: "it leaks")
    with pytest.raises(ValueError, match="was asked for, but it leaks"):
        auto.settle(handle, Engine(packing=True), [{"input_ids": [5, 6], "labels": [-100, 6]}], 0, 1, 1)
