"""The one table of layer shapes."""

from dataclasses import FrozenInstanceError

import pytest

from lofit_kernels.shapes import SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_one_that_a_decoder_layer_can_have(name):
    shape = SHAPES[name]
    assert min(shape.layers, shape.H, shape.H_kv, shape.D, shape.N) > 0
    assert shape.H % shape.H_kv == 0
    assert shape.inner > shape.N
    assert shape.K == shape.H * shape.D
    assert shape.projection == (shape.H, shape.D, shape.N)
    # a Llama's heads cover its hidden columns; Gemma's do not, nor do the toy's
    assert (shape.K == shape.N) == name.startswith(("Llama", "SmolLM2"))


def test_shapes_are_frozen():
    with pytest.raises(FrozenInstanceError):
        SHAPES["toy"].H = 1


def test_models_of_one_projection():
    # grouped heads and a wider feed-forward part leave the output projection as it was
    assert SHAPES["Llama-3-8B"].projection == SHAPES["Llama-2-7B"].projection
