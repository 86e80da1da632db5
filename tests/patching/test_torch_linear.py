"""Linears whose arithmetic is replaced for the whole process are called as they are, and not merged into."""

import pytest
import torch
from torch import nn

import lofit_fast as lf
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens


def replace_forward(monkeypatch) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda linear, x: forward(linear, x) * 1.25)


def replace_function(monkeypatch) -> None:
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: linear(x, weight, bias) * 1.25)


REPLACED = pytest.mark.parametrize("replace", [replace_forward, replace_function])


@REPLACED
@pytest.mark.parametrize(
    "component, scope",
    # scales are one adapter at a time
    [("offset", "none"), ("offset", "folded"), ("offset", "chosen"), ("scale", "none"), ("scale", "folded")],
)
def test_another_arithmetic_is_called_with_the_vectors(monkeypatch, replace, component, scope):
    model, alone = tiny_model("llama"), tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(**{component: "all"}))
    randomize(handle)
    vectors = {number: getattr(layer, component).detach().flatten() for number, layer in handle.layers.items()}
    if scope == "chosen":
        handle.add("b", handle.adapter())
        handle.set_active("b")
    for number, v in vectors.items():
        projection = alone.model.layers[number].self_attn.o_proj
        change = (lambda z, v=v: z + v) if component == "offset" else (lambda z, v=v: z * (1 + v))
        projection.register_forward_pre_hook(lambda _, z, change=change: (change(z[0]),))
    replace(monkeypatch)
    with handle.folded() if scope == "folded" else torch.enable_grad():
        got = model(tokens()).logits
    torch.testing.assert_close(got, alone(tokens()).logits)


@REPLACED
def test_another_arithmetic_is_not_merged_into(monkeypatch, replace):
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    with monkeypatch.context() as patched:
        replace(patched)
        with pytest.raises(ValueError, match="replaced for the whole process"):
            handle.merge()
    handle.merge()
