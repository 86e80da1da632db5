"""One fold per forward for all layers: the same numbers as layer by layer, under whatever runs a model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.patching.fold import decoder_of
from lofit_kernels import aten, usual_projections
from lofit_kernels.layer_fold import LayerFold
from tests.library_versions import compiles_hooks
from tests.patching.folding_models import build, gradients, loss, same
from tests.tiny_models import tokens


@pytest.fixture
def calls(monkeypatch):
    """How many layers each fold and each backward of a fold was for, in order."""
    seen = {"fold": [], "bwd": []}
    for name in seen:
        counted = getattr(aten, f"grouped_{name}")

        def count(*args, name=name, counted=counted):
            seen[name].append(len(args[0]))
            return counted(*args)

        monkeypatch.setattr(aten, f"grouped_{name}", count)
    return seen


def by_layer(dtype=torch.float32, seeds=(5,)) -> list:
    """The gradients when every layer folds for itself."""
    model, handle = build(dtype=dtype)
    handle.watches.fold.remove()
    for seed in seeds:
        loss(model, seed).backward()
    return gradients(handle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_is_one_fold_and_one_backward_to_the_same_bits(calls, dtype):
    model, handle = build(dtype=dtype)
    loss(model).backward()
    assert calls == {"fold": [2], "bwd": [2]}
    assert same(gradients(handle), by_layer(dtype))
    assert calls["fold"] == [2, 1, 1]


def test_folding_belongs_to_its_forward(calls):
    model, handle = build()
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
    before = loss(model)
    before.backward()
    optimizer.step()
    # no version counter moves here
    for parameter in handle.parameters():
        parameter.data.mul_(1.5)
    after = loss(model)
    assert calls["fold"] == [2, 2]
    handle.watches.fold.remove()
    assert torch.equal(loss(model), after) and not torch.equal(before, after)


def test_folding_under_accumulation():
    expected = by_layer(seeds=(5, 6))
    model, handle = build()
    for seed in (5, 6):
        loss(model, seed).backward()
    assert same(gradients(handle), expected)
    model, handle = build()
    # the sum of two gradients does not depend on their order
    (loss(model, 5) + loss(model, 6)).backward()
    for got, wanted in zip(gradients(handle), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_folding_under_activation_checkpointing(calls, reentrant):
    expected = by_layer()
    model, handle = build()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls["bwd"].clear()
    loss(model).backward()
    assert same(gradients(handle), expected)
    # without a graph in the first run, each layer's second run has one of its own
    assert calls["bwd"] == ([1, 1] if reentrant else [2])


def test_folding_under_mixed_checkpointing_of_two_forwards():
    expected = by_layer(seeds=(6, 5))
    model, handle = build()
    model.train()
    model.enable_input_require_grads()
    losses = []
    for seed, reentrant in ((5, True), (6, False)):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses.append(loss(model, seed))
    sum(losses).backward()
    for got, wanted in zip(gradients(handle), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_folding_of_parts_of_the_model(calls):
    model, handle = build()
    hidden = torch.randn(2, 5, 64)
    layer = handle.layers[1]
    layer(hidden).sum().backward()
    assert calls == {"fold": [1], "bwd": [1]}
    assert handle.layers[0].offset.grad is None and layer.offset.grad is not None
    # the decoder is called without its head
    model.model(tokens()).last_hidden_state.sum().backward()
    assert calls == {"fold": [1, 2], "bwd": [1, 2]}


def test_folding_gives_no_gradient_to_layers_that_were_not_run(calls):
    model, handle = build()
    model.model.layers = model.model.layers[:1]
    loss(model).backward()
    assert calls == {"fold": [2], "bwd": [1]}
    assert handle.layers[1].offset.grad is None and handle.layers[0].offset.grad is not None


def test_folding_without_gradients_is_not_done(calls):
    model, handle = build()
    with torch.no_grad():
        loss(model)
    with torch.inference_mode():
        loss(model)
    model.generate(tokens(), max_new_tokens=2, do_sample=False)
    with handle.folded():
        loss(model)
    with handle.disabled():
        loss(model)
    assert calls == {"fold": [], "bwd": []}


def test_folding_inside_a_folded_scope_is_fresh_where_gradients_are(calls):
    model, handle = build()
    with handle.folded(), torch.enable_grad():
        loss(model).backward()
        assert all(at.here.kept is not None for at in handle.layers.values() if at.offset is not None)
    assert calls["fold"] == [2]
    assert same(gradients(handle), by_layer())


def test_folding_skips_what_it_may_not_touch(calls):
    model, handle = build()
    handle.layers[0].inner.register_forward_hook(lambda *_: None)
    loss(model).backward()
    assert calls["fold"] == [1]
    handle.layers[1].inner.weight.requires_grad_(True)
    loss(model).backward()
    # gradients of the weight run through the offset too: the op has both
    assert calls["fold"] == [1]
    assert handle.layers[1].inner.weight.grad is not None
    handle.layers[1].inner.weight.requires_grad_(False)
    handle.layers[1].offset.requires_grad_(False)
    loss(model).backward()
    assert calls["fold"] == [1]


def test_folding_waits_for_weights_that_come_later(calls):
    model, handle = build()
    weight = handle.layers[0].inner.weight
    kept = weight.detach().clone()

    def gather(*_):
        weight.untyped_storage().resize_(kept.numel() * kept.element_size())
        weight.data.copy_(kept)

    weight.untyped_storage().resize_(0)
    model.model.layers[0].register_forward_pre_hook(gather)
    loss(model).backward()
    assert calls["fold"] == [1, 1]
    assert same(gradients(handle), by_layer())


def left_over(handle) -> list:
    return [layer for layer in handle.layers.values() if layer.here.folded is not None]


def test_folding_ends_with_an_exception():
    model, handle = build()
    fail = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(model)
    assert left_over(handle) == []
    fail.remove()
    loss(model).backward()
    assert same(gradients(handle), by_layer())


def test_folding_keeps_no_graph_alive(monkeypatch):
    model, handle = build()
    graphs = []

    def fold(self, layers):
        ready = folding_of(self, layers)
        graphs.extend(weakref.ref(folded.exact) for folded in ready)
        return ready

    folding_of = LayerFold.__call__
    monkeypatch.setattr(LayerFold, "__call__", fold)
    result = loss(model)
    assert left_over(handle) == []
    del result
    gc.collect()
    assert len(graphs) == 2 and all(ref() is None for ref in graphs)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_folding_of_a_copy_is_its_own(twin_of, calls):
    model, handle = build()
    loss(model).backward()
    twin = twin_of(model)
    other = lf.handle_of(twin)
    twin.zero_grad()
    for parameter in other.parameters():
        parameter.data.mul_(2)
    loss(twin).backward()
    assert calls["fold"] == [2, 2]
    assert same(gradients(handle), by_layer()) and not same(gradients(other), gradients(handle))
    other.unpatch()
    assert not twin.model._forward_pre_hooks and model.model._forward_pre_hooks
    loss(model).backward()
    assert calls["fold"][-1] == 2


@pytest.mark.parametrize("end", ["unpatch", "merge"])
def test_folding_ends_with_the_handle(calls, end):
    model, handle = build()
    getattr(handle, end)()
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks
    model.requires_grad_(True)
    loss(model).backward()
    assert calls["fold"] == []


def test_folding_under_a_wrapper(calls):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model, handle = build()
    loss(Wrapper(model)).backward()
    # as an engine does that takes the forward and leaves the call
    ids = tokens(seed=5)
    model.forward(input_ids=ids, labels=ids).loss.backward()
    assert calls == {"fold": [2, 2], "bwd": [2, 2]}
    assert same(gradients(handle), by_layer(seeds=(5, 5)))


def test_folding_leaves_replicas_alone(calls):
    model, handle = build()
    twin = copy.copy(model.model)
    with torch.enable_grad():
        twin(tokens())
    # the replica's hooks are the original's, and layers fold for themselves
    assert calls["fold"] == [1, 1]


@pytest.mark.parametrize(
    "whole", [pytest.param(True, marks=compiles_hooks), pytest.param(False, marks=pytest.mark.slow)]
)
def test_folding_compiles(dynamo, calls, whole):
    expected = by_layer()
    for seen in calls.values():
        seen.clear()
    model, handle = build()
    # tracing is what is tested: one layer is as good as all, and nothing is lowered
    if whole:
        run = torch.compile(model, backend="eager", fullgraph=True)
    else:
        run = model
        model.model.layers[1].compile(backend="eager", fullgraph=True)
    loss(run).backward()
    assert left_over(handle) == []
    assert calls == {"fold": [2], "bwd": [2]}
    for got, wanted in zip(gradients(handle), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_a_compiled_layer_of_a_model_folded_in_eager_mode_is_an_op(dynamo, monkeypatch):
    model, _ = build(lf.LofitConfig(offset="all"))
    traced = []

    def never(*args):
        # in a graph it would trace the launcher of every kernel
        traced.append(args)
        return eager(*args)

    eager = usual_projections.folded_projection
    monkeypatch.setattr(usual_projections, "folded_projection", never)
    model.model.layers[1].compile(backend="eager", fullgraph=True)
    loss(model).backward()
    # the two layers that are not compiled
    assert len(traced) == 2


def test_compiled_layers_see_no_new_graph_in_a_later_forward(dynamo):
    model, handle = build(lf.LofitConfig(offset="all"))
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        loss(model).backward()
    first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        loss(model).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == first


def test_a_copy_made_in_the_midst_of_a_forward_folds_for_itself():
    model, handle = build(lf.LofitConfig(offset="all"))
    copies = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)))
    expected = loss(model)
    hook.remove()
    copies[0].model.layers[1]._forward_pre_hooks.clear()
    assert left_over(handle) == left_over(lf.handle_of(copies[0])) == []
    assert torch.equal(loss(copies[0]), expected)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"], "model"),
        (["model.layers.1.self_attn.o_proj"], "model.layers.1.self_attn"),
    ],
)
def test_decoder_of(llama, names, expected):
    assert decoder_of(llama, names) is llama.get_submodule(expected)
