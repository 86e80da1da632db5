"""Ways in which the weights of a patched model's projections become others."""

import pytest
from torch import nn

import lofit_fast as lf


def loaded(model) -> None:
    with pytest.warns(UserWarning, match="state_dict"):
        model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


def written(model) -> None:
    for layer in lf.handle_of(model).layers.values():
        layer.inner.weight.mul_(1.5)


def replaced(model) -> None:
    for layer in lf.handle_of(model).layers.values():
        layer.inner.weight = nn.Parameter(layer.inner.weight * 1.5, requires_grad=False)


def replaced_through_ours(model) -> None:
    for layer in lf.handle_of(model).layers.values():
        layer.weight = nn.Parameter(layer.inner.weight * 1.5, requires_grad=False)


def cast(model) -> None:
    model.bfloat16().float()
