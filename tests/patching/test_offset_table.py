"""The table of W v of several adapters: each is folded once, whatever else comes and goes."""

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.patching import offset_table
from tests.library_versions import compiles_hooks
from tests.ordinary_sample import some_now
from tests.patching.changed_weights import cast, loaded, replaced, replaced_through_ours, written
from tests.tiny_models import tiny_model, tokens


def test_a_weight_that_is_written_to_is_folded_anew():
    model, config = tiny_model("llama"), lf.LofitConfig(offset=[(1, 2)], init_std=0.5)
    handle = lf.patch(model, lf.LofitConfig(offset=[(0, 0)]))
    handle.add("a", config, trained=False)
    handle.set_active("a")
    with torch.no_grad():
        model(tokens())
        model.model.layers[1].self_attn.o_proj.inner.weight.mul_(3)
        got = model(tokens()).logits
        handle.unpatch()
        lf.patch(model, config)
        torch.testing.assert_close(got, model(tokens()).logits)


def test_each_adapter_is_folded_once(monkeypatch):
    folded, fold = [], offset_table.fold_offset

    def counted(weight, vectors, heads):
        folded.append(len(vectors))
        return fold(weight, vectors, heads)

    monkeypatch.setattr(offset_table, "fold_offset", counted)
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(offset=[(1, 0)]))
    for number in range(5):
        heads = [(1, head) for head in range(1 + number % 2)]
        handle.add(f"a{number}", lf.LofitConfig(offset=heads, init_std=0.5, seed=number), trained=False)
    assert folded == [1, 2, 1, 2, 1]
    handle.remove("a1")
    # into the row that is free again
    handle.add("b", lf.LofitConfig(offset=[(1, 3)], init_std=0.5, seed=9), trained=False)
    assert folded == [1, 2, 1, 2, 1, 1]
    with torch.no_grad():
        handle.set_active("b")
        got = model(tokens()).logits
        handle.set_active("a3")
        other = model(tokens()).logits
    handle.unpatch()
    for seed, heads, expected in ((9, [(1, 3)], got), (3, [(1, 0), (1, 1)], other)):
        alone = lf.patch(model, lf.LofitConfig(offset=heads, init_std=0.5, seed=seed))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()).logits, expected)
        alone.unpatch()


def two_adapters():
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(offset=[(0, 0)]))
    # in a layer of the handle's own, and in another
    handle.add("b", lf.LofitConfig(offset=[(0, 1), (1, 2)], init_std=0.5, seed=5), trained=False)
    handle.set_active("b")
    return model, handle


def folded_anew(model, handle) -> torch.Tensor:
    """Logits without anything that is kept, uncompiled."""
    for layer in handle.layers.values():
        layer.others.stale = True
    with torch.compiler.set_stance("force_eager"):
        return model(tokens()).logits


@pytest.mark.parametrize(
    "change", some_now([loaded, written, replaced, replaced_through_ours, cast], written, replaced)
)
def test_compiled_layers_see_a_weight_that_has_changed(dynamo, change):
    model, handle = two_adapters()
    for layer in model.model.layers[:2]:
        layer.compile(backend="eager")
    with torch.no_grad():
        before = model(tokens()).logits
        change(model)
        got = model(tokens()).logits
        expected = folded_anew(model, handle)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, before, rtol=1e-3)


# what a graph of the whole model is not told: writes in place, and another weight behind our back
@compiles_hooks
@pytest.mark.parametrize(
    "change, told",
    some_now(
        [(loaded, False), (replaced_through_ours, False), (cast, False), (written, True), (replaced, True)],
        (loaded, False),
    ),
)
def test_a_model_compiled_whole_is_told_of_a_weight_that_has_changed(dynamo, change, told):
    model, handle = two_adapters()
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = run(tokens()).logits
        change(model)
        if told:
            handle.set_active("b")
        got = run(tokens()).logits
        expected = folded_anew(model, handle)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, before, rtol=1e-3)


def test_an_address_that_is_used_again_is_no_proof():
    model, handle = two_adapters()
    inner = handle.layers[1].inner
    numbers = inner.weight.detach().numpy().copy()
    with torch.no_grad():
        inner.weight = nn.Parameter(torch.from_numpy(numbers), requires_grad=False)
        model(tokens())
        # another weight where the first was, which has been written to as rarely
        numbers *= 3
        inner.weight = nn.Parameter(torch.from_numpy(numbers), requires_grad=False)
        got = model(tokens()).logits
        torch.testing.assert_close(got, folded_anew(model, handle))
