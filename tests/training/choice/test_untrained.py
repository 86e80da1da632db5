"""Scores of heads that need no training: chance, gradients, probes."""

import math

import pytest
import torch

from lofit_fast import LofitConfig, patch, select_heads
from lofit_fast.patching.architectures import find_projections
from lofit_fast.selection.linear_probes import probing_layer_scores
from lofit_fast.training.choice.untrained import random_scores, saliency_scores
from tests.tiny_models import HEADS, LAYERS, tokens


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


def test_saliency_of_parts_is_that_of_their_sums(llama):
    rows = tokens(batch=5)
    handle = patch(llama, LofitConfig(scale="all", init_std=0.0))
    whole = [llama(input_ids=rows[i : i + 2], labels=rows[i : i + 2], use_cache=False).loss for i in (0, 2, 4)]
    halves = [loss * part for loss, part in zip(batch_losses(llama, rows), (0.5, 0.5, 0.5, 0.5, 1.0), strict=True)]
    got, expected = saliency_scores(handle, iter(halves), parts=2), saliency_scores(handle, whole)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


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
