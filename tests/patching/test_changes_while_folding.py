"""Weights and vectors that change during a forward, or inside `folded`: what is folded is folded anew."""

import sys
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import lofit_fast as lf
from lofit_fast.patching import layer as layer_module
from lofit_fast.patching.early_fold import Call
from tests.library_versions import compiles_hooks
from tests.ordinary_sample import slow_if
from tests.patching.changed_weights import loaded, replaced, written
from tests.patching.folding_models import CONFIG, build, gradients, loss, same
from tests.tiny_models import tokens


@pytest.mark.parametrize("config", [CONFIG, lf.LofitConfig(offset="all")])
def test_a_weight_put_there_by_a_layers_hook_is_the_one_that_counts(config):
    model, handle = build(config)
    inner = handle.layers[1].inner
    old, new = inner.weight, nn.Parameter(inner.weight.detach() * 2, requires_grad=False)

    def put(*_):
        inner.weight = new

    hook = model.model.layers[1].register_forward_pre_hook(put)
    inner.weight = old
    loss(model).backward()
    got = gradients(handle)
    hook.remove()
    for p in handle.parameters():
        p.grad = None
    loss(model).backward()
    assert same(got, gradients(handle))


def stronger(attention, *_) -> None:
    with torch.no_grad():
        attention.o_proj.inner.weight.mul_(1.3)


def clamped(layer, *_) -> None:
    layer.offset.data.clamp_(-0.1, 0.1)


class Half(nn.Module):
    def forward(self, vectors):
        return vectors / 2


def written_by_the_attentions_hook(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(stronger)


def clamped_by_the_projections_hook(model) -> None:
    for layer in lf.handle_of(model).layers.values():
        if layer.offset is not None:
            layer.register_forward_pre_hook(clamped)


def pruned(model) -> None:
    layer = lf.handle_of(model).layers[1]
    mask = torch.ones_like(layer.offset)
    mask[0] = 0
    prune.custom_from_mask(layer, "offset", mask)
    # the mask is applied in every forward, to what an optimizer has made of the vectors
    layer.offset_orig.data.mul_(3)


def parametrized(model) -> None:
    parametrize.register_parametrization(lf.handle_of(model).layers[1], "offset", Half())


@pytest.mark.parametrize("config", [CONFIG, lf.LofitConfig(offset="all")])
@pytest.mark.parametrize(
    "change", [written_by_the_attentions_hook, clamped_by_the_projections_hook, pruned, parametrized]
)
def test_what_changes_during_a_forward_counts_as_layer_by_layer(change, config):
    losses, grads = [], []
    for together in (True, False):
        model, handle = build(config)
        change(model)
        if not together:
            handle.watches.fold.remove()
        losses.append(loss(model))
        losses[-1].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert torch.equal(*losses)
    assert same(*grads) and all(grad is not None for grad in grads[0])


@pytest.mark.parametrize("counted", [True, False])
def test_what_an_interrupted_forward_has_left_never_counts(counted):
    model, handle = build(lf.LofitConfig(offset="all"))

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        loss(model)
    hook.remove()
    with torch.no_grad():
        for p in handle.parameters():
            # as fused optimizers write, and others
            (p if counted else p.data).mul_(-2)
    layer, z = handle.layers[2], torch.randn(2, 5, 64)
    got = layer(z)
    with torch.no_grad():
        torch.testing.assert_close(got, layer(z))
    # of one forward each: nothing is shared with the other
    layer(z).sum().backward()
    got.sum().backward()


def test_a_call_goes_on_until_it_ends():
    def ask(call, depth):
        return call.goes_on() if depth == 0 else ask(call, depth - 1)

    def called():
        call = Call(sys._getframe())
        # from however deep, and again from as deep
        assert all(ask(call, depth) for depth in (0, 3, 3, 1, 7))
        return call

    ended = called()
    assert not any(ask(ended, depth) for depth in (0, 1, 3, 7))


def other_vectors(model) -> None:
    for p in lf.handle_of(model).parameters():
        p.mul_(-3)


@pytest.mark.parametrize(
    "change, compiled",
    slow_if(
        lambda change, compiled: compiled and change is not written,
        list(product([loaded, written, replaced, other_vectors], [False, True])),
    ),
)
def test_a_folded_scope_sees_what_changes_inside_it(dynamo, change, compiled):
    model, handle = build(lf.LofitConfig(offset="all"))
    handle.add("b", lf.LofitConfig(offset="all", init_std=0.5), trained=False)
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="eager")

    def logits():
        with handle.rows(["default", "b"]):
            mixed = model(tokens()).logits
        return model(tokens()).logits, mixed

    with handle.folded():
        before = logits()
        change(model)
        got = logits()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = logits()
    for one, old, wanted in zip(got, before, expected, strict=True):
        torch.testing.assert_close(one, wanted)
        assert not torch.allclose(one, old, rtol=1e-3)


@compiles_hooks
def test_a_folded_scope_of_a_model_compiled_whole_sees_a_state_dict(dynamo):
    model, handle = build(lf.LofitConfig(offset="all"))
    run = torch.compile(model, backend="eager", fullgraph=True)
    with handle.folded():
        before = run(tokens()).logits
        loaded(model)
        got = run(tokens()).logits
    with torch.no_grad():
        torch.testing.assert_close(got, model(tokens()).logits)
    assert not torch.allclose(got, before, rtol=1e-3)


@pytest.mark.parametrize("by_hook", [False, True])
def test_a_folded_scope_folds_once_until_something_changes(monkeypatch, by_hook):
    model, handle = build(lf.LofitConfig(offset="all"))
    folded = []

    def counted(*args):
        folded.append(args)
        return fold(*args)

    fold = layer_module.fold_offset
    monkeypatch.setattr(layer_module, "fold_offset", counted)
    with handle.folded():
        for _ in range(3):
            model(tokens())
        assert len(folded) == 3
        if by_hook:
            model.model.layers[1].self_attn.register_forward_pre_hook(stronger)
            got = model(tokens()).logits
            handle.layers[1].inner.weight.div_(1.3)
        else:
            handle.layers[1].inner.weight.mul_(1.3)
            got = model(tokens()).logits
            # anew once, and kept again
            model(tokens())
            assert len(folded) == 4
    with torch.no_grad():
        torch.testing.assert_close(got, model(tokens()).logits)
