"""Layers that are compiled, and a scope in which they are not."""

import pytest
import torch
from torch import nn

from lofit_fast.training.engine import compiled_layers
from lofit_fast.training.engine.compiled_layers import any_compiled, compiled, uncompiled


class Layer(nn.Module):
    """A layer of our own: the compiler leaves those of torch alone."""

    factor = 2

    def forward(self, x):
        """Any shape."""
        return self.factor * x + 1


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


def test_graphs_of_earlier_scopes_leave_room_for_those_of_later_ones(graphs, monkeypatch):
    monkeypatch.setattr(compiled_layers, "_GRAPHS", 4)
    layers, x = nn.ModuleList([Layer()]), torch.ones(2, 3)
    for number in range(8):
        # what a graph is made for
        layers[0].factor = number
        with compiled(layers):
            for _ in range(2):
                assert layers[0](x).equal(number * x + 1)
        assert len(graphs) == number + 1
    # they are kept as long as there is room
    layers[0].factor = 6
    with compiled(layers):
        layers[0](x)
    assert len(graphs) == 8


def test_a_limit_that_others_have_reached_is_none(graphs, monkeypatch):
    monkeypatch.setattr(compiled_layers, "_GRAPHS", 4)
    layers, x = nn.ModuleList([Layer()]), torch.ones(2, 3)
    with compiled(layers):
        for layers[0].factor in range(9):
            layers[0](x)
    assert len(graphs) == 4
    with compiled(layers):
        layers[0](x)
    assert len(graphs) == 5
