"""The search that tuning runs follow: beyond an edge as long as it takes, else halfway, as often for all."""

import math

import pytest

from benchmarks.accuracy.method_table import METHODS, grid
from benchmarks.accuracy.tuning_search import MOST, RUNS, Tried, best_of, edges, next_options

# what LoFiT has where nothing is asked for
RECIPE = {"select_lr": 5e-4, "tune_lr": 5e-3, "top": 0.1}


def searched(start, accuracy, defaults=None, **counts):
    """All runs of a search. accuracy: of all settings of a run."""
    asked, tried = list(start), []
    while (options := asked.pop(0) if asked else next_options(tried, **counts)) is not None:
        settings = {**(defaults or {}), **options}
        tried.append(Tried(options, settings, (accuracy(settings),)))
    return tried


def hill(**tops):
    """An accuracy that falls with the distance from a setting's best, in powers of ten."""
    return lambda settings: -sum(abs(math.log10(settings[key] / top)) for key, top in tops.items())


@pytest.mark.parametrize("top", [3e-5, 2e-4, 1e-3, 4e-3, 3e-2, 0.1])
def test_it_ends_inside_and_near_the_best(top):
    start = [{"lr": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)]
    tried = searched(start, hill(lr=top))
    best = tried[best_of(tried)]
    assert RUNS <= len(tried) <= MOST and not edges(tried, best)
    assert 1 / 1.6 <= best.settings["lr"] / top <= 1.6


def test_only_an_edge_brings_more_runs():
    start = [{"lr": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)]
    assert len(searched(start, hill(lr=1e-3))) == RUNS
    # without an end: as many as there may be, and no more
    assert len(searched(start, hill(lr=1e9))) == MOST


def test_several_settings_leave_their_edges_in_turn():
    start = ({}, {"tune_lr": 2e-2}, {"select_lr": 2e-3, "tune_lr": 2e-2}, {"top": 0.2})
    tried = searched(start, hill(select_lr=2e-3, tune_lr=2e-2, top=0.1), RECIPE)
    assert [one.options for one in tried[4:7]] == [
        {"select_lr": 2e-3, "tune_lr": 0.05},
        {"select_lr": 0.005, "tune_lr": 2e-2},
        {"select_lr": 2e-3, "tune_lr": 2e-2, "top": 0.05},
    ]
    assert not edges(tried, tried[best_of(tried)])


def test_all_heads_are_no_edge():
    tried = [Tried({"top": top}, {}, (top,)) for top in (0.1, 0.3, 1.0)]
    assert edges(tried, tried[2]) == {}
    assert edges(tried, tried[0]) == {"top": "smallest"}
    # nor does it go beyond
    assert next_options([Tried({"top": top}, {}, (top,)) for top in (0.1, 0.8)])["top"] == 1.0


def test_of_equals_the_one_with_the_fewest_edges_is_taken():
    tried = [Tried({"alpha": alpha}, {}, (0.0,)) for alpha in (1.0, 5.0, 15.0)]
    assert best_of(tried) == 1
    # a level field has nothing to follow, and is looked at between
    assert next_options(tried) == {"alpha": 8.7}


def test_what_is_as_good_as_the_best_is_followed_beyond_its_edge():
    """Which of equals is taken is chance: the other's direction may be the better one."""
    start = ({"top": 0.05}, {"top": 0.03}, {"top": 0.1}, {"top": 0.2})
    scores = {0.05: 0.1, 0.1: 0.5, 0.2: 0.5, 0.5: 0.6, 1.0: 0.7}
    tried = searched(start, lambda settings: scores.get(settings["top"], 0.4), RECIPE)
    assert tried[best_of(tried[:RUNS])].options["top"] == 0.1
    assert [one.options["top"] for one in tried[RUNS:]] == [0.5, 1.0]
    assert dict(tried[best_of(tried)].options) == {"top": 1.0}


def test_where_nothing_is_right_no_equal_is_followed():
    start = [{"lr": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)]
    assert len(searched(start, lambda settings: 0.0)) == RUNS


def test_settings_that_were_asked_for_twice_count_once():
    start = ({}, {"tune_lr": 5e-3}, {"tune_lr": 2e-2}, {"tune_lr": 2e-3})
    assert len(searched(start, hill(tune_lr=5e-3), RECIPE)) == RUNS + 1


def test_what_has_no_numbers_has_nothing_more_to_try():
    tried = [Tried({"span": span}, {"span": span}, (0.5,)) for span in ((0.0, 0.5), (0.5, 1.0))]
    assert next_options([*tried, Tried({"flag": True}, {}, (0.1,))]) is None


def test_nothing_is_tried_twice():
    tried = searched([{"lr": 1e-3}, {"lr": 1e-2}], hill(lr=3e-3), runs=20, most=20)
    assert len({one.settings["lr"] for one in tried}) == len(tried) < 20


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.tuned])
def test_every_tuned_method_has_numbers_to_search(method):
    start = grid(method)
    tried = [Tried(options, {**RECIPE, **options}, (float(n),)) for n, options in enumerate(start)]
    assert next_options(tried) is not None
