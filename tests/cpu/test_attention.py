"""Grouped attention: eager attention's numbers, no expanded keys, and no weights kept for the backward pass."""

from types import SimpleNamespace

import pytest
import torch

import lofit_fast as lf
from lofit_fast.cpu.attention import GROUPED, grouped_attention, register
from lofit_fast.training.engine import Engine, prepared
from tests.tiny_models import FAMILIES, tiny_model, tokens

register()
MODULE = SimpleNamespace(training=False)
CASES = [*((family, {}) for family in FAMILIES), ("gemma2", {"sliding_window": 4})]


def drawn(heads=4, groups=2, queries=5, keys=5, dtype=torch.float64, requires_grad=True):
    draw = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, 8), (2, groups, keys, 8), (2, groups, keys, 8)
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def by_head(query, key, value, mask=None, scaling=None, softcap=None):
    """Equation by equation, one query head at a time."""
    heads = []
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // key.shape[1])
        scores = query[:, head] @ key[:, shared].transpose(1, 2) * (8**-0.5 if scaling is None else scaling)
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        scores = scores if mask is None else scores + mask[:, 0]
        heads.append(scores.softmax(-1) @ value[:, shared])
    return torch.stack(heads, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3, "softcap": 1.5}], ids=["plain", "capped"])
def test_grouped_attention_is_its_equation(groups, queries, options):
    query, key, value = drawn(groups=groups, queries=queries)
    mask = torch.full((2, 1, queries, 5), float("-inf"), dtype=torch.float64).triu(1 + 5 - queries)
    out, weights = grouped_attention(MODULE, query, key, value, mask, **options)
    assert weights is None
    torch.testing.assert_close(out, by_head(query, key, value, mask, **options))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [15, 16, 20])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3}, {"softcap": 1.5}], ids=["plain", "scaled", "capped"])
def test_grouped_attention_of_a_prompt_is_its_equation(groups, queries, options):
    query, key, value = drawn(groups=groups, queries=queries, keys=24, requires_grad=False)
    mask = torch.full((2, 1, queries, 24), float("-inf"), dtype=torch.float64).triu(1 + 24 - queries)
    out, _ = grouped_attention(MODULE, query, key, value, mask, **options)
    assert out.shape == (2, queries, 4, 8) and out.is_contiguous()
    torch.testing.assert_close(out, by_head(query, key, value, mask, **options))


def test_a_prompt_makes_no_scores_and_one_token_no_fused_call(monkeypatch):
    fused, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counted(query, *args, **options):
        calls.append(query.shape[2])
        return fused(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for queries in (1, 15, 16, 64):
        grouped_attention(MODULE, *drawn(queries=queries, keys=64, requires_grad=False), None)
    assert calls == [16, 64]


def test_grouped_attention_gradcheck():
    mask = torch.full((1, 1, 3, 3), float("-inf"), dtype=torch.float64).triu(1)
    # two heads on one of keys and values: a forward for each number of each
    inputs = drawn(heads=2, groups=1, queries=3, keys=3)
    torch.autograd.gradcheck(lambda q, k, v: grouped_attention(MODULE, q, k, v, mask, softcap=2.0)[0], inputs)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_grouped_attention_in_a_model(family, changes):
    model = tiny_model(family, torch.float64, **changes)
    handle = lf.patch(model, lf.LofitConfig(scale="all", init_std=0.1))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    found = {}
    for attention in ("eager", GROUPED):
        with prepared(model, Engine(attention=attention)):
            loss = model(ids, attention_mask=mask, labels=ids.where(mask.bool(), -100), use_cache=False).loss
            found[attention] = loss, *torch.autograd.grad(loss, list(handle.parameters()))
            generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
            found[attention] += (generated.double(),)
    for ours, theirs in zip(found[GROUPED], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_grouped_attention_keeps_no_weights():
    query, key, value = drawn(heads=4, groups=2, queries=32, keys=32, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bfloat16)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_attention(MODULE, query, key, value, mask)
    given = {tensor.data_ptr(): tensor.nbytes for tensor in (query, key, value, mask)}
    # what is empty is kept by older torch
    assert {place: size for place, size in kept.items() if size}.items() <= given.items()


def test_grouped_attention_without_a_gradient_is_no_checkpoint(monkeypatch):
    monkeypatch.setattr("lofit_fast.cpu.attention.checkpoint", None)
    query, key, value = drawn(requires_grad=False)
    assert grouped_attention(MODULE, query, key, value, None)[0].shape == (2, 5, 4, 8)


def test_grouped_attention_drops_weights_only_while_training():
    query, key, value = drawn()
    whole = grouped_attention(MODULE, query, key, value, None, dropout=0.5)[0]
    torch.testing.assert_close(whole, by_head(query, key, value))
    trained = grouped_attention(SimpleNamespace(training=True), query, key, value, None, dropout=0.5)[0]
    assert not torch.allclose(trained, whole)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 5, 20])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_grouped_attention_with_sinks_is_its_equation(groups, queries, requires_grad):
    query, key, value = drawn(groups=groups, queries=queries, keys=24, requires_grad=requires_grad)
    mask = torch.full((2, 1, queries, 24), float("-inf"), dtype=torch.float64).triu(1 + 24 - queries)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=requires_grad)
    out, _ = grouped_attention(MODULE, query, key, value, mask, s_aux=sinks)
    # a sink is one more key, of a given score, whose value is zero
    heads = []
    for head in range(4):
        shared = head // (4 // groups)
        scores = query[:, head] @ key[:, shared].transpose(1, 2) * 8**-0.5 + mask[:, 0]
        weights = torch.cat((scores, sinks[head].expand(2, queries, 1)), -1).softmax(-1)[..., :-1]
        heads.append(weights @ value[:, shared])
    expected = torch.stack(heads, 2)
    torch.testing.assert_close(out, expected)
    if requires_grad:
        inputs = query, key, value, sinks
        got, wanted = (torch.autograd.grad(each.square().sum(), inputs) for each in (out, expected))
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_grouped_attention_with_values_of_another_width(requires_grad):
    query, key, value = drawn(queries=20, keys=20, requires_grad=requires_grad)
    narrow = value[..., :3].detach().requires_grad_(requires_grad)
    out, _ = grouped_attention(MODULE, query, key, narrow, None)
    torch.testing.assert_close(out, by_head(query, key, value)[..., :3])


@pytest.mark.parametrize(("heads", "groups"), [(7, 2), (7, 3), (4, 8)])
def test_grouped_attention_refuses_heads_that_cannot_share(heads, groups):
    with pytest.raises(ValueError, match=f"{heads} query heads on {groups} heads of keys and values"):
        grouped_attention(MODULE, *drawn(heads=heads, groups=groups), None)
