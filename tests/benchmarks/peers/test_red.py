"""RED: a scale and a bias on every layer's FFN output."""

import pytest
import torch

from benchmarks.peers import red
from tests.benchmarks.peers.edited import logits, shake
from tests.tiny_models import HIDDEN, LAYERS, tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_red_is_its_equation(family):
    model, plain = tiny_model(family, torch.float64), tiny_model(family, torch.float64)
    attachment = red.make(model)
    shake(attachment)
    vectors = list(attachment.parameters())
    for layer, (scale, bias) in zip(plain.model.layers, zip(vectors[::2], vectors[1::2], strict=True), strict=True):
        layer.mlp.register_forward_hook(lambda _, __, out, s=1 + scale[0], b=bias[0]: s * out + b)
    assert (logits(model) - logits(plain)).abs().max() <= 1e-12
    assert (logits(model) - logits(tiny_model(family, torch.float64))).abs().max() > 1e-3


def test_red_has_two_numbers_per_hidden_dimension_and_layer(llama):
    assert red.make(llama).n_parameters() == 2 * HIDDEN * LAYERS
