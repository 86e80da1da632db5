"""The one tester that everything which computes LoFiT goes through: the patched model in each of its forms, every peer.

Each takes a model and vectors, and must compute what the plain hook computes; with vectors of zero, the base model.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import lofit_fast as lf
from benchmarks.peers.peer import Absent
from benchmarks.peers.table import TIMED
from tests.oracle import Hook, Vectors
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


@pytest.fixture(params=FORMS)
def form(request):
    """Each way to compute LoFiT in turn: (model, vectors, folder) -> a scope with a model in it."""
    return FORMS[request.param]


@pytest.mark.parametrize("component", HEADS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_computes_what_the_hook_computes(form, family, component, tmp_path):
    values = vectors(component, std=0.3)
    hooked, base = tiny_model(family), logits(tiny_model(family))
    Hook(hooked, values)
    expected = logits(hooked)
    assert relative(expected, base) > 100 * NEAR
    with form(tiny_model(family), values, tmp_path) as model:
        assert relative(logits(model), expected) < NEAR


@pytest.mark.parametrize("component", HEADS)
def test_vectors_of_zero_are_the_base_model(form, component, tmp_path):
    with form(tiny_model("llama"), vectors(component, std=0.0), tmp_path) as model:
        assert relative(logits(model), logits(tiny_model("llama"))) < NEAR


# merging is what changes them
@pytest.mark.parametrize("name", [name for name in FORMS if name != "merged"])
@pytest.mark.parametrize("component", HEADS)
def test_the_weights_of_the_base_stay(name, component, tmp_path):
    source = tiny_model("llama")
    before = [(p, p.detach().clone()) for p in source.parameters()]
    with FORMS[name](source, vectors(component, std=0.3), tmp_path) as model:
        logits(model)
    assert all(torch.equal(p, value) for p, value in before)
