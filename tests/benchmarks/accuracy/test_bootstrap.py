"""The paired bootstrap against what is known exactly, and mean and spread."""

import math

import pytest

from benchmarks.accuracy.bootstrap import mean_and_spread, paired_bootstrap, stars


def test_the_same_answers_are_no_difference():
    assert paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == 1.0


def test_a_constant_difference_is_as_sure_as_resampling_can_be():
    assert paired_bootstrap([1.0] * 30, [0.0] * 30, resamples=2000) == pytest.approx(1 / 2001)


def test_p_agrees_with_the_normal_distribution():
    # 200 questions, 35 won and 20 lost: d = 0.075, its standard error from the sample's own variance
    first, second = [1.0] * 35 + [0.0] * 165, [0.0] * 35 + [1.0] * 20 + [0.0] * 145
    n, d = 200, 15 / 200
    error = math.sqrt((55 / n - d * d) / n)
    expected = math.erfc(d / error / math.sqrt(2))
    got = paired_bootstrap(first, second)
    assert got == pytest.approx(expected, rel=0.15)
    assert paired_bootstrap(second, first) == pytest.approx(got, rel=0.1)
    assert stars(got) == "*"


def test_pairing_matters():
    # the same two shares; where both win the same questions, the small difference is all that varies
    paired = paired_bootstrap([1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50)
    unpaired = paired_bootstrap([1.0] * 60 + [0.0] * 40, [0.0] * 50 + [1.0] * 50)
    assert paired < 0.01 < 0.05 < unpaired


def test_it_is_the_same_every_time():
    hits = [float(i % 3 == 0) for i in range(50)], [float(i % 4 == 0) for i in range(50)]
    assert paired_bootstrap(*hits) == paired_bootstrap(*hits)


@pytest.mark.parametrize("first, second", [([], []), ([1.0], [1.0, 0.0])])
def test_other_questions_are_refused(first, second):
    with pytest.raises(ValueError, match="expected hits of the same questions"):
        paired_bootstrap(first, second)


@pytest.mark.parametrize("p, expected", [(0.2, ""), (0.05, ""), (0.049, "*"), (0.009, "**"), (0.0009, "***")])
def test_stars(p, expected):
    assert stars(p) == expected


def test_one_seed_has_no_spread():
    assert mean_and_spread([0.5]) == (0.5, None)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    with pytest.raises(ValueError, match="at least one"):
        mean_and_spread([])
