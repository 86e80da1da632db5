"""The paired bootstrap against what is known exactly, and mean and spread."""

import math
import random
import statistics

import pytest
import torch

from benchmarks.accuracy.bootstrap import Resampled, mean_and_spread, paired_bootstrap, stars
from tests.ordinary_sample import some_now


def p_of(first, second, **options):
    """That of one seed."""
    return paired_bootstrap([first], [second], **options).p


def test_the_same_answers_are_no_difference():
    assert p_of([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == 1.0


def test_a_constant_difference_is_as_sure_as_resampling_can_be():
    assert p_of([1.0] * 30, [0.0] * 30, resamples=2000) == pytest.approx(1 / 2001)


def test_p_agrees_with_the_normal_distribution():
    # 200 questions, 35 won and 20 lost: d = 0.075, its standard error from the sample's own variance
    first, second = [1.0] * 35 + [0.0] * 165, [0.0] * 35 + [1.0] * 20 + [0.0] * 145
    n, d = 200, 15 / 200
    error = math.sqrt((55 / n - d * d) / n)
    expected = math.erfc(d / error / math.sqrt(2))
    got = p_of(first, second)
    assert got == pytest.approx(expected, rel=0.15)
    assert p_of(second, first) == pytest.approx(got, rel=0.1)
    assert stars(got) == "*"


def test_pairing_matters():
    # the same two shares; where both win the same questions, the small difference is all that varies
    paired = p_of([1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50)
    unpaired = p_of([1.0] * 60 + [0.0] * 40, [0.0] * 50 + [1.0] * 50)
    assert paired < 0.01 < 0.05 < unpaired


def test_it_is_the_same_every_time():
    hits = [float(i % 3 == 0) for i in range(50)], [float(i % 4 == 0) for i in range(50)]
    assert p_of(*hits) == p_of(*hits)


@pytest.mark.parametrize("first, second", [([], []), ([[]], [[]]), ([[1.0]], [[1.0, 0.0]]), ([[1.0]], [[1.0]] * 2)])
def test_other_questions_and_seeds_are_refused(first, second):
    with pytest.raises(ValueError, match="expected hits of the same seeds and questions"):
        paired_bootstrap(first, second)


def test_seeds_that_disagree_leave_it_open():
    """Two seeds, one 40 points above and one 2: as of a method that one seed has spoilt."""
    hits = [[1.0] * 40 + [0.0] * 60, [1.0] * 2 + [0.0] * 98]
    found = paired_bootstrap(hits, [[0.0] * 100] * 2)
    assert found.low < 0 < 0.21 < found.high and found.p > 0.2
    # the same mean of seeds that agree
    sure = paired_bootstrap([[1.0] * 21 + [0.0] * 79] * 2, [[0.0] * 100] * 2)
    assert sure.low > 0.1 and sure.p < 0.001


@pytest.mark.parametrize("n_seeds", [2, 3])
def test_means_of_resampled_seeds_vary_as_those_of_other_seeds_would(n_seeds):
    """Every question the same, so that seeds alone make a difference: the variance is s^2 / n, with n - 1 below s^2."""
    seeds = [float(i * i) for i in range(n_seeds)]
    found = paired_bootstrap([[value] * 5 for value in seeds], [[0.0] * 5] * n_seeds, level=0.6827, resamples=20_000)
    error = statistics.stdev(seeds) / math.sqrt(n_seeds)
    # few seeds make few different means, so the interval is near the normal one only
    assert (found.high - found.low) / 2 == pytest.approx(error, rel=0.5)
    plain = (max(seeds) - min(seeds)) / 2 * math.sqrt(n_seeds / (n_seeds - 1))
    whole = paired_bootstrap([[value] * 5 for value in seeds], [[0.0] * 5] * n_seeds, level=1.0)
    assert (whole.high - whole.low) / 2 == pytest.approx(plain)


@pytest.mark.parametrize("spread, share", some_now([(0.05, 0.93), (0.1, 0.83)], (0.1, 0.83)))
def test_how_often_it_holds_the_truth_is_what_the_report_says(spread, share):
    """No difference but what two seeds, so many points apart, and 450 questions bring by chance."""
    draw = torch.Generator().manual_seed(0)
    held, trials = 0, 400
    for _ in range(trials):
        right = torch.rand(450, generator=draw) * 0.6 + 0.2
        by_seed = right + spread * torch.randn(2, 1, generator=draw)
        first, second = ((torch.rand(2, 450, generator=draw) < rates).double() for rates in (by_seed, right))
        found = paired_bootstrap(first.tolist(), second.tolist(), resamples=500)
        held += found.low <= 0 <= found.high
    assert held / trials == pytest.approx(share, abs=0.03)


def test_p_and_interval_agree():
    draw = random.Random(1)
    for _ in range(40):
        first, second = ([[float(draw.random() < rate) for _ in range(60)] for _ in range(2)] for rate in (0.6, 0.45))
        found = paired_bootstrap(first, second, resamples=2000)
        if not 0.02 < found.p < 0.08:
            assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_an_interval_holds_what_was_planted():
    draw = torch.Generator().manual_seed(1)
    other = (torch.rand(3, 400, generator=draw) < 0.4).double()
    one = (other.bool() | (torch.rand(3, 400, generator=draw) < 0.1)).double()
    found = paired_bootstrap(one.tolist(), other.tolist())
    assert 0 < found.low < float((one - other).mean()) < found.high < 0.1
    assert paired_bootstrap(one.tolist(), other.tolist()) == found
    assert paired_bootstrap(other.tolist(), other.tolist()) == Resampled(0.0, 0.0, 1.0)


@pytest.mark.parametrize("p, expected", [(0.2, ""), (0.05, ""), (0.049, "*"), (0.009, "**"), (0.0009, "***")])
def test_stars(p, expected):
    assert stars(p) == expected


def test_one_seed_has_no_spread():
    assert mean_and_spread([0.5]) == (0.5, None)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    with pytest.raises(ValueError, match="at least one"):
        mean_and_spread([])
