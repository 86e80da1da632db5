"""Which attention training takes: a rule on the device and the family."""

import pytest
import torch

from lofit_fast.data.pack import GROUPED
from lofit_fast.training.engine.attention_choice import attention_refusal, best_attention
from lofit_fast.training.engine.causal_attention import CAUSAL
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
