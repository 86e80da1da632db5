"""What an offset writes, against the same sums made by hand."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.selection.adapter_overlap import offsets_in, overlaps
from lofit_fast.selection.attention_maps import attention_maps
from lofit_fast.selection.written_tokens import written_tokens
from tests.tiny_models import FAMILIES, HEAD_DIM, tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer

HEADS = [(0, 1), (2, 3)]


def adapted(family="llama", heads=HEADS, **config):
    handle = lf.patch(tiny_model(family), lf.LofitConfig(offset=heads, init_std=0.5, **config))
    return handle, tokens(1, 9)[0].tolist()


def by_hand(handle, ids, head):
    """The change of the next token's logits, from the base alone: its last state, its norm, its head."""
    model, (layer, number) = handle.model, head
    offset = offsets_in(handle.adapter())[head]
    handle.unpatch()
    block = model.model.layers[layer]
    weight = block.self_attn.o_proj.weight
    part = weight[:, number * (weight.shape[1] // 4) : (number + 1) * (weight.shape[1] // 4)] @ offset
    seen = {}
    hook = block.self_attn.o_proj.register_forward_hook(lambda m, i, y: seen.update(y=y[0, -1]))
    end = model.model.layers[-1].register_forward_hook(lambda m, i, y: seen.update(h=y[0, -1]))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
        if hasattr(block, "pre_feedforward_layernorm"):
            norm = block.post_attention_layernorm
            part = norm(seen["y"] + part) - norm(seen["y"])
        cap = getattr(model.config, "final_logit_softcapping", None)
        changed = model.lm_head(model.model.norm(seen["h"] + part))
        changed = torch.tanh(changed / cap) * cap if cap else changed
    hook.remove()
    end.remove()
    return changed - logits


def test_what_rounding_makes_is_not_named():
    """The same adapter on the same weights in bfloat16 names none but those that it moves in full precision too."""
    handle, ids = adapted()
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(0.002)
    handle.model.to(torch.bfloat16)
    shown = written_tokens(handle, tiny_tokenizer(), ids, 5)
    largest = handle.model(torch.tensor([ids])).logits[0, -1].abs().max().item()
    changes = [abs(change) for one in shown for _, change in (*one.promoted, *one.suppressed)]
    assert all(change > 0.9 * torch.finfo(torch.bfloat16).eps * largest for change in changes)
    assert len(changes) < 20


@pytest.mark.parametrize("family", FAMILIES)
def test_the_named_tokens_are_those_of_the_direct_path(family):
    handle, ids = adapted(family)
    tokenizer = tiny_tokenizer()
    before = [p.detach().clone() for p in handle.parameters()]
    found = written_tokens(handle, tokenizer, ids, 5)
    assert sorted(one.head for one in found) == HEADS
    assert found[0].norm >= found[1].norm and all(one.part > 0 for one in found)
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))
    change = by_hand(handle, ids, found[0].head)
    values, best = change.topk(5)
    assert [token for token, _ in found[0].promoted] == [tokenizer.decode([token]) for token in best]
    torch.testing.assert_close(torch.tensor([x for _, x in found[0].promoted]), values, atol=1e-4, rtol=1e-4)
    assert found[0].suppressed[0][1] == pytest.approx(change.min().item(), abs=1e-4)


def test_no_hook_is_left_and_the_model_computes_as_before():
    handle, ids = adapted()
    with torch.no_grad():
        before = handle.model(torch.tensor([ids])).logits
        written_tokens(handle, tiny_tokenizer(), ids)
        assert torch.equal(handle.model(torch.tensor([ids])).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in handle.model.model.layers.modules())


@pytest.mark.parametrize(("ids", "count"), [([], 3), ([5], 0)])
def test_nothing_to_read_is_refused(ids, count):
    handle, _ = adapted()
    with pytest.raises(ValueError, match="expected a prompt of one token or more, and tokens from 1"):
        written_tokens(handle, tiny_tokenizer(), ids, count)


def test_scales_write_nothing():
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale=[(0, 0)]))
    with pytest.raises(ValueError, match="expected an adapter with offsets, got one of scales alone"):
        written_tokens(handle, tiny_tokenizer(), [5, 6])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_is_the_models_own_and_its_setting_stays(family):
    handle, ids = adapted(family)
    had = handle.model.config._attn_implementation
    maps = attention_maps(handle, ids, HEADS)
    assert handle.model.config._attn_implementation == had and list(maps) == HEADS
    for weights in maps.values():
        assert weights.shape == (9, 9) and weights.triu(1).abs().max() == 0
        torch.testing.assert_close(weights.sum(1), torch.ones(9))
    handle.model.set_attn_implementation("eager")
    with torch.no_grad():
        kept = handle.model(torch.tensor([ids]), output_attentions=True).attentions
    torch.testing.assert_close(maps[2, 3], kept[2][0, 3])


def test_overlap_counts_heads_and_compares_directions():
    v = torch.ones(HEAD_DIM)
    one = {(0, 1): v, (2, 3): v}
    other = {(0, 1): -v, (1, 1): v, (1, 2): v}
    (found,) = overlaps({"one": one, "other": other}, 12)
    assert (found.names, found.heads, found.shared, found.by_chance) == (("one", "other"), (2, 3), 1, 0.5)
    assert (found.jaccard, found.cosine) == (0.25, pytest.approx(-1.0))
    assert overlaps({"one": one, "none": {(1, 0): v}}, 12)[0].cosine is None


def test_offsets_of_every_head_are_found():
    handle, _ = adapted(heads="all")
    found = offsets_in(handle.adapter())
    assert len(found) == 12 and torch.equal(found[1, 2], handle.layers[1].offset[2])
