"""The one tester that everything which computes LoFiT goes through: the patched model in each of its forms, every peer.

Each takes a model and vectors, and must compute what the plain hook computes; with vectors of zero, the base model.
"""

import copy
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import nn

import lofit_fast as lf
from benchmarks.peers.peer import Absent
from benchmarks.peers.table import TIMED
from tests.oracle import Hook, Vectors
from tests.ordinary_sample import crossed, slow_if
from tests.patched_models import logits, relative
from tests.tiny_models import HEAD_DIM, tiny_model

HEADS = {
    "scale": {0: [1, 3], 2: [0, 1, 2, 3]},
    "offset": {0: [1], 1: [0, 2], 2: [3]},
}
# float32, three layers, products in another order
NEAR = 1e-5


def vectors(component: str, std: float) -> Vectors:
    draw = torch.Generator().manual_seed(3)
    heads = HEADS[component]
    return {(n, component): (hs, std * torch.randn(len(hs), HEAD_DIM, generator=draw)) for n, hs in heads.items()}


def handle_with(model: nn.Module, values: Vectors) -> lf.LofitHandle:
    TIMED["ours"].attach(model, values)
    return lf.handle_of(model)


@contextmanager
def folded(model, values, folder):
    """W v computed once for a scope."""
    with handle_with(model, values).folded(), torch.no_grad():
        yield model


@contextmanager
def loaded(model, values, folder):
    """Saved as a folder, and loaded into a model of its own."""
    handle_with(copy.deepcopy(model), values).save(folder)
    lf.load(model, folder)
    yield model


@contextmanager
def merged(model, values, folder):
    """Plain weights, in memory."""
    yield handle_with(model, values).merge()


@contextmanager
def exported(model, values, folder):
    """A plain folder, loaded by stock code."""
    from transformers import AutoModelForCausalLM

    lf.export(handle_with(model, values), folder)
    yield AutoModelForCausalLM.from_pretrained(folder).eval()


def peer(name):
    @contextmanager
    def attached(model, values, folder):
        try:
            yield TIMED[name].attach(model, values).model
        except Absent as reason:
            pytest.skip(str(reason))

    return attached


FORMS = {one.__name__: one for one in (folded, loaded, merged, exported)}
# the compiled hook says nothing about arithmetic that the plain one does not say, and takes a minute
FORMS |= {name: peer(name) for name, row in TIMED.items() if row.computes == "ours" and name != "compiled_hook"}


# slow: Gemma's scales, which are a Llama's
CASES = slow_if(
    lambda form, family, component: (family, component) == ("gemma3", "scale"),
    list(product(FORMS, ["llama", "gemma3"], HEADS)),
)


@pytest.mark.parametrize("form, family, component", CASES)
def test_it_computes_what_the_hook_computes(form, family, component, tmp_path):
    values = vectors(component, std=0.3)
    hooked, base = tiny_model(family), logits(tiny_model(family))
    Hook(hooked, values)
    expected = logits(hooked)
    assert relative(expected, base) > 100 * NEAR
    with FORMS[form](tiny_model(family), values, tmp_path) as model:
        assert relative(logits(model), expected) < NEAR


# in the ordinary run each form with the one or the other, here and below; slow: with both
@pytest.mark.parametrize("form, component", crossed(list(FORMS), list(HEADS)))
def test_vectors_of_zero_are_the_base_model(form, component, tmp_path):
    with FORMS[form](tiny_model("llama"), vectors(component, std=0.0), tmp_path) as model:
        assert relative(logits(model), logits(tiny_model("llama"))) < NEAR


# merging is what changes them
@pytest.mark.parametrize("component, name", crossed(list(HEADS), [name for name in FORMS if name != "merged"]))
def test_the_weights_of_the_base_stay(name, component, tmp_path):
    source = tiny_model("llama")
    before = [(p, p.detach().clone()) for p in source.parameters()]
    with FORMS[name](source, vectors(component, std=0.3), tmp_path) as model:
        logits(model)
    assert all(torch.equal(p, value) for p, value in before)
