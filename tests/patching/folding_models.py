"""A tiny model with vectors of every kind, its loss and its gradients."""

import torch

import lofit_fast as lf
from tests.oracle import randomize
from tests.tiny_models import tiny_model, tokens

# layer 0 has both components, layer 1 heads with a gap, layer 2 a scale only
CONFIG = lf.LofitConfig(scale=[(0, 0), (2, 1)], offset=[(0, 1), (0, 2), (1, 0), (1, 3)])


def build(config=CONFIG, dtype=torch.float32, **changes):
    model = tiny_model("llama", dtype, **changes)
    handle = lf.patch(model, config)
    randomize(handle)
    return model, handle


def loss(model, seed: int = 5):
    ids = tokens(seed=seed)
    return model(input_ids=ids, labels=ids).loss


def gradients(handle) -> list:
    return [None if p.grad is None else p.grad.clone() for p in handle.parameters()]


def same(got, expected) -> bool:
    return all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
