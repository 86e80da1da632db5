"""Which of two is above: by the interval of the paired difference, and never from blanks."""

import pytest

from benchmarks.accuracy.comparison import (
    ABOVE,
    BELOW,
    LEVEL,
    NO_DIFFERENCE,
    Comparison,
    accuracy,
    difference,
    elsewhere,
    enumerated,
    p_value,
    starred,
    tally,
)

N = 40


def runs(*rates, method="lofit", first_seed=42, n=N):
    """A result per rate and seed: the first questions right, so that pairs vary as little as they can."""
    return [
        {"cell": {"seed": first_seed + i, "method": method}, "hits": [float(q < rate * n) for q in range(n)]}
        for i, rate in enumerate(rates)
    ]


def test_the_interval_decides():
    high, low = runs(0.9, 0.9), runs(0.4, 0.4)
    above = difference(high, low)
    assert above.verdict == ABOVE and above.mean == 50.0 and 0 < above.low < 50.0 < above.high
    below = difference(low, high)
    assert (below.verdict, below.mean) == (BELOW, -50.0)
    same = difference(high, high)
    assert (same.verdict, same.mean, same.low, same.high) == (LEVEL, 0.0, 0.0, 0.0)
    assert above.words() == f"+50.0, +{above.low:.1f} to +{above.high:.1f}"


def test_one_question_shows_nothing():
    assert difference(runs(0.5 + 1 / N), runs(0.5)).verdict == LEVEL


def test_seeds_that_disagree_show_nothing():
    # with the seeds averaged, every question that differs is won
    assert difference(runs(1.0, 0.0), runs(0.4, 0.4)).verdict == LEVEL


def test_what_learns_nothing_counts_for_every_seed():
    base = runs(0.2, method="zero_shot")
    assert difference(runs(0.9, 0.5), base).mean == pytest.approx(50.0)
    assert difference(base, runs(0.9, 0.5)).mean == pytest.approx(-50.0)


@pytest.mark.parametrize("first, second", [([], runs(0.5)), (runs(0.5), []), (runs(0.5), runs(0.1, first_seed=50))])
def test_without_shared_seeds_there_is_none(first, second):
    assert difference(first, second) is None


def test_only_shared_seeds_count():
    assert difference(runs(0.5, 0.9), runs(0.4)).mean == pytest.approx(10.0)


def test_p_is_of_the_seeds_that_the_difference_is_of():
    # the third seed of the one would make it better by far
    one, other = runs(0.5, 0.5, 1.0), runs(0.5, 0.5)
    assert p_value(one, other) == 1.0 and starred(one, other) == ""
    assert p_value(one, runs(0.2, 0.1, 0.2)) < 0.05
    assert starred(runs(0.9), runs(0.1)) == "***"
    assert p_value(one, runs(0.5, first_seed=50)) is None and starred(one, []) == ""
    assert p_value(runs(0.2, method="zero_shot"), runs(0.2, 0.2)) == 1.0


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="same seeds and questions"):
        difference(runs(0.5), runs(0.5, n=30))
    with pytest.raises(ValueError, match="same seeds and questions"):
        p_value(runs(0.5), runs(0.5, n=30))


def test_an_accuracy_lies_in_its_interval():
    mean, low, high = accuracy(runs(0.5, 0.7))
    assert mean == pytest.approx(60.0) and low < 60.0 < high
    assert accuracy(runs(0.0)) == (0.0, 0.0, 0.0)


def test_a_sentence_says_all_and_what_is_missing():
    others = {"A": runs(0.1), "B": runs(0.3), "C": runs(1.0), "D": runs(0.6), "E": []}
    comparison = Comparison("here", "ours", runs(0.6), others)
    text = comparison.sentence()
    assert text.startswith("**here**: ours has 60.0 % (")
    assert "; above A and B (nearest: B, +30.0, " in text
    assert "; below C (-40.0, " in text
    assert f"; {NO_DIFFERENCE} from D (+0.0, +0.0 to +0.0)" in text
    assert text.endswith("; not finished: E.")
    assert tally("ours", [comparison]) == (
        f"4 comparisons: ours is above in 2, below in 1, and in 1 there is {NO_DIFFERENCE}."
        " Missing cells leave 1 more comparison open."
    )


def test_blanks_say_nothing():
    comparison = Comparison("here", "ours", [], {"A": runs(0.1), "B": []})
    assert comparison.sentence() == "**here**: ours is not finished, so nothing is said."
    assert tally("ours", [comparison]) == "Nothing can be said yet: cells of all 2 comparisons are missing."


def test_elsewhere_takes_what_was_judged_there():
    there = {"metrics": {"exact_match": 1.0}, "hits": [1.0]}
    found = [{"hits": [0.0], "outside": {"mquake": there}}, {"hits": [0.0], "outside": {}}]
    assert [one["hits"] for one in elsewhere(found, "mquake")] == [[1.0]]


def test_names_are_enumerated():
    assert [enumerated(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
