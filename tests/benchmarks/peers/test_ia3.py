"""IA3 by PEFT: its equation, and what it trains."""

import pytest
import torch

from benchmarks.peers import ia3
from tests.benchmarks.peers.edited import logits, shake
from tests.tiny_models import HEAD_DIM, LAYERS, tiny_model

pytest.importorskip("peft")


def test_ia3_is_its_equation():
    model, plain = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    base = logits(plain)
    attachment = ia3.make(model)
    shake(attachment)
    with torch.no_grad():
        for adapted, layer in zip(model.model.layers, plain.model.layers, strict=True):
            for name in ("k_proj", "v_proj"):
                scale = getattr(adapted.self_attn, name).ia3_l["default"]
                getattr(layer.self_attn, name).weight.mul_(scale.view(-1, 1))
            # what the down projection is given is a column of its weight
            layer.mlp.down_proj.weight.mul_(adapted.mlp.down_proj.ia3_l["default"].view(1, -1))
    assert (logits(model) - logits(plain)).abs().max() <= 1e-12 < 1e-3 < (logits(model) - base).abs().max()


def test_ia3_counts_its_scales(llama):
    keys, ffn = 2 * HEAD_DIM, llama.config.intermediate_size
    assert ia3.make(llama).n_parameters() == LAYERS * (2 * keys + ffn)
