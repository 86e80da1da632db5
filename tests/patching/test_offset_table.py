"""The table of W v of several adapters: each is folded once, whatever else comes and goes."""

import torch

import lofit_fast as lf
from lofit_fast.patching import offset_table
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
