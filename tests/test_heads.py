"""The best heads by their scores."""

import math

import pytest
import torch

from lofit_fast import LofitConfig, select_heads
from lofit_fast.heads import jaccard

SCORES = torch.tensor([[0.1, 0.9, 0.3], [0.9, 0.2, 0.8]])
BEST_FIRST = [(0, 1), (1, 0), (1, 2), (0, 2), (1, 1), (0, 0)]


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
