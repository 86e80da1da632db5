"""Scores of heads by how far their vectors have moved."""

import math

import pytest
import torch

from lofit_fast import LofitConfig, head_scores, patch, select_heads
from lofit_fast.patching.head_norms import offset_norms
from tests.oracle import randomize
from tests.tiny_models import HEADS, LAYERS


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


def test_offset_norms_are_norms_of_offsets(llama):
    handle = patch(llama, LofitConfig(scale=[(0, 0)], offset=[(2, 3), (2, 1)]))
    randomize(handle)
    scores = offset_norms(handle)
    assert {tuple(x) for x in scores.isfinite().nonzero().tolist()} == {(2, 1), (2, 3)}
    torch.testing.assert_close(scores[2, [1, 3]], handle.layers[2].offset.detach().norm(dim=1))
    handle.unpatch()
    with pytest.raises(ValueError, match="offset norms need offsets"):
        offset_norms(patch(llama, LofitConfig(scale="all")))
