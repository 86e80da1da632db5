"""Scores, and the best heads by them."""

import math

import pytest
import torch

from lofit_fast import LofitConfig, head_scores, patch, select_heads
from lofit_fast.heads import jaccard, offset_norms, probing_layer_scores, random_scores, saliency_scores
from lofit_fast.patching.architectures import find_projections
from tests.oracle import randomize
from tests.tiny_models import HEADS, LAYERS, tokens

SCORES = torch.tensor([[0.1, 0.9, 0.3], [0.9, 0.2, 0.8]])
BEST_FIRST = [(0, 1), (1, 0), (1, 2), (0, 2), (1, 1), (0, 0)]


def test_head_scores_are_norms(llama):
    handle = patch(llama, LofitConfig(scale="all"))
    randomize(handle)
    scores = head_scores(handle)
    assert (scores.shape, scores.dtype) == ((LAYERS, HEADS), torch.float32)
    assert not scores.requires_grad
    expected = torch.stack([handle.layers[n].scale.detach().square().sum(1).sqrt() for n in range(LAYERS)])
    torch.testing.assert_close(scores, expected)


def test_head_scores_are_float32_in_a_float64_model(llama):
    handle = patch(llama, LofitConfig(scale="all"))
    llama.double()
    assert head_scores(handle).dtype == torch.float32


def test_head_scores_of_heads_without_a_scale(llama):
    handle = patch(llama, LofitConfig(scale=[(2, 3), (0, 1)], offset=[(1, 1)]))
    scores = head_scores(handle)
    assert {tuple(x) for x in scores.isfinite().nonzero().tolist()} == {(0, 1), (2, 3)}
    assert scores[1].tolist() == [-math.inf] * HEADS
    assert set(select_heads(scores, top=1.0)) == {(0, 1), (2, 3)}


def test_head_scores_need_scales(llama):
    handle = patch(llama, LofitConfig(offset="all"))
    with pytest.raises(ValueError, match="head scores need scales"):
        head_scores(handle)


@pytest.mark.parametrize("count", range(1, 7))
def test_select_heads_best_first_ties_to_the_lower(count):
    assert select_heads(SCORES, count) == BEST_FIRST[:count]


@pytest.mark.parametrize("top, count", [(0.01, 1), (0.17, 1), (0.5, 3), (0.75, 4), (1.0, 6)])
def test_select_heads_takes_a_fraction(top, count):
    assert select_heads(SCORES, top) == BEST_FIRST[:count]


def test_select_heads_breaks_many_ties_in_order():
    # small sorts happen to be stable anyway
    scores = torch.arange(4096).remainder(3).float().view(64, 64)
    heads = select_heads(scores, 2000)
    assert heads == sorted(heads, key=lambda head: (-scores[head].item(), head))


def test_select_heads_makes_a_config():
    heads = select_heads(SCORES, 2)
    assert all(type(x) is int for pair in heads for x in pair)
    assert LofitConfig(offset=heads).offset == tuple(heads)


def test_select_heads_fraction_is_of_the_heads_in_the_running():
    scores = SCORES.clone()
    scores[1] = -math.inf
    assert select_heads(scores, 0.67) == [(0, 1), (0, 2)]


def test_select_heads_from_a_layer_up():
    assert select_heads(SCORES, 2, min_layer=0) == BEST_FIRST[:2]
    assert select_heads(SCORES, 2, min_layer=1) == [(1, 0), (1, 2)]
    # a fraction of the heads in the running, as ever
    assert select_heads(SCORES, 0.34, min_layer=1) == [(1, 0)]
    assert SCORES.isfinite().all()


@pytest.mark.parametrize("top, min_layer, count", [(4, 1, 3), (0.5, 2, 0)])
def test_select_heads_refuses_more_than_the_upper_layers_have(top, min_layer, count):
    with pytest.raises(ValueError, match=f"only {count} have a score"):
        select_heads(SCORES, top, min_layer)


@pytest.mark.parametrize(
    "scores, top, message",
    [
        (SCORES, 7, "top 7 heads, but only 6"),
        (SCORES, 0, "at least 1 head"),
        (SCORES, 1.5, "fraction"),
        (SCORES, True, "top"),
        (SCORES[0], 1, r"\(layers, heads\), got \(3,\)"),
        (torch.tensor([[math.nan, 1.0]]), 1, "not finite"),
        (torch.tensor([[math.inf, 1.0]]), 1, "not finite"),
        (torch.full((2, 2), -math.inf), 0.5, "only 0 have a score"),
    ],
)
def test_select_heads_refuses(scores, top, message):
    with pytest.raises(ValueError, match=message):
        select_heads(scores, top)


@pytest.mark.parametrize(
    "first, second, expected",
    [([], [], 1.0), ([(0, 1)], [], 0.0), ([(0, 1), (1, 1)], [(1, 1), (0, 1)], 1.0), ([(0, 1)], [(0, 1), (2, 2)], 0.5)],
)
def test_jaccard(first, second, expected):
    assert jaccard(first, second) == expected


def test_offset_norms_are_norms_of_offsets(llama):
    handle = patch(llama, LofitConfig(scale=[(0, 0)], offset=[(2, 3), (2, 1)]))
    randomize(handle)
    scores = offset_norms(handle)
    assert {tuple(x) for x in scores.isfinite().nonzero().tolist()} == {(2, 1), (2, 3)}
    torch.testing.assert_close(scores[2, [1, 3]], handle.layers[2].offset.detach().norm(dim=1))
    handle.unpatch()
    with pytest.raises(ValueError, match="offset norms need offsets"):
        offset_norms(patch(llama, LofitConfig(scale="all")))


def test_random_scores_depend_on_the_seed_alone(llama):
    scores = random_scores(llama, 1)
    assert (scores.shape, scores.dtype) == ((LAYERS, HEADS), torch.float32)
    assert scores.equal(random_scores(llama, 1))
    assert not scores.equal(random_scores(llama, 2))
    # a layer without attention has no head to draw
    del llama.model.layers[1].self_attn.o_proj
    assert [p.layer for p in find_projections(llama)] == [0, 2]
    without = random_scores(llama, 1)
    assert without[1].isneginf().all()
    assert without[[0, 2]].equal(scores[[0, 2]])


def batch_losses(model, rows):
    for row in rows:
        yield model(input_ids=row[None], labels=row[None], use_cache=False).loss


@pytest.mark.parametrize("penalised", [False, True])
def test_saliency_is_the_push_that_adam_would_give(llama, penalised):
    rows = tokens(batch=5)
    handle = patch(llama, LofitConfig(scale="all", init_std=0.0))
    scales = list(handle.parameters())
    gradients = torch.stack([torch.stack(torch.autograd.grad(x, scales)) for x in batch_losses(llama, rows)])
    mean, rms = gradients.mean(0), gradients.square().mean(0).sqrt()
    # a penalty that half the heads get past
    l1 = float(mean.abs().amax(2).median()) if penalised else 0.0
    scores = saliency_scores(handle, batch_losses(llama, rows), l1)
    assert all(not scale.any() and scale.grad is None for scale in scales)
    expected = ((mean.abs() - l1) / (rms + 1e-8)).clamp(min=0).norm(dim=2)
    assert (scores.shape, scores.dtype) == ((LAYERS, HEADS), torch.float32)
    pushed = scores > 0
    assert int(pushed.sum()) in ((5, 6) if penalised else (12,))
    torch.testing.assert_close(scores[pushed], expected[pushed], rtol=1e-4, atol=1e-4)
    assert (expected[~pushed] < 1e-4).all()


def test_saliency_past_a_large_penalty_orders_by_what_comes_closest(llama):
    handle = patch(llama, LofitConfig(scale="all", init_std=0.0))
    scores = saliency_scores(handle, batch_losses(llama, tokens(batch=2)), l1=10.0)
    assert (scores < 0).all()
    assert scores.isfinite().all()
    assert len(select_heads(scores, 3)) == 3


def test_saliency_needs_scales_and_losses(llama):
    handle = patch(llama, LofitConfig(scale=[(1, 2)], init_std=0.0))
    with pytest.raises(ValueError, match="at least one batch"):
        saliency_scores(handle, [])
    scores = saliency_scores(handle, batch_losses(llama, tokens(batch=2)))
    assert scores.isfinite().nonzero().tolist() == [[1, 2]]
    handle.unpatch()
    with pytest.raises(ValueError, match="saliency needs scales"):
        saliency_scores(patch(llama, LofitConfig(offset="all")), [])


def test_probing_layers_come_whole_and_best_first():
    heads = torch.tensor([[0.5, 0.9, 1.0], [0.7, 0.6, -math.inf], [0.8, 0.5, 0.9]])
    scores = probing_layer_scores(torch.tensor([0.6, 0.9, 0.6]), heads)
    # layer 1 has two heads; layers 0 and 2 are equally good
    assert select_heads(scores, 8) == [(1, 0), (1, 1), (0, 2), (0, 1), (0, 0), (2, 2), (2, 0), (2, 1)]
