"""Layers that are compiled, and a scope in which they are not."""

import pytest
import torch
from torch import nn

from lofit_fast.training.engine import compiled_layers
from lofit_fast.training.engine.compiled_layers import any_compiled, compiled, uncompiled


class Layer(nn.Module):
    """A layer of our own: the compiler leaves those of torch alone."""

    def forward(self, x):
        """Any shape."""
        return 2 * x + 1


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs a compiler was given, one entry each."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled_layers, "BACKEND", backend)
    yield found
    torch._dynamo.reset()


def test_uncompiled_layers_run_as_they_are(graphs):
    layers, x = nn.ModuleList([Layer()]), torch.ones(2, 3)
    with uncompiled(layers):
        expected = layers[0](x)
    with compiled(layers):
        assert any_compiled(layers)
        with uncompiled(layers):
            assert layers[0](x).equal(expected)
        assert not graphs
        assert layers[0](x).equal(expected)
        assert len(graphs) == 1
