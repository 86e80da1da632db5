"""BEFT by PEFT: its equation, and what it trains."""

import pytest
import torch
from torch import nn

from benchmarks.peers import beft
from tests.benchmarks.peers.edited import logits, shake
from tests.tiny_models import HEAD_DIM, LAYERS, tiny_model

pytest.importorskip("peft")


def test_beft_is_its_equation():
    model, plain = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    base = logits(plain)
    attachment = beft.make(model)
    shake(attachment)
    for adapted, layer in zip(model.model.layers, plain.model.layers, strict=True):
        bias = adapted.self_attn.v_proj.beft_bias["default"].detach().flatten()
        layer.self_attn.v_proj.bias = nn.Parameter(bias)
    assert (logits(model) - logits(plain)).abs().max() <= 1e-12 < 1e-3 < (logits(model) - base).abs().max()


@pytest.mark.filterwarnings("error")
def test_beft_counts_its_biases_and_warns_of_nothing(llama):
    assert beft.make(llama).n_parameters() == LAYERS * 2 * HEAD_DIM
