"""Interleaving, ratios and their intervals."""

import pytest

from benchmarks.speed.timing import FOR_INTERVAL, in_turns, interleaved, machine, ratio


def test_interleaved_runs_each_once_a_round_in_turning_order():
    calls = []
    peers = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved(peers, rounds=2, warmup=1)
    assert calls == list("abc") + list("bca") + list("cab")
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_calls_in_turns_get_their_round_and_what_they_return_is_kept():
    called = []
    returned = in_turns({0: lambda number: called.append(number), 1: lambda number: -number}, rounds=2, warmup=1)
    assert called == [0, 1, 2]
    assert returned == {0: [None, None], 1: [-1, -2]}


def test_interleaved_refuses_no_rounds():
    with pytest.raises(ValueError, match="at least 1 round, got 0"):
        interleaved({"a": lambda: None}, rounds=0)


def test_ratio_is_the_median_of_pairs_inside_its_interval():
    found = ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])
    assert found.median == 3.0
    assert (found.low, found.high, found.rounds) == (2.0, 4.0, 3)


def test_few_rounds_have_a_range_and_say_so():
    few = [1.0] * (FOR_INTERVAL - 2) + [9.0]
    assert str(ratio(few, [1.0] * len(few))) == "1.00 (1.00 to 9.00, range of 5)"
    many = [1.0] * 20 + [9.0]
    assert str(ratio(many, [1.0] * len(many))) == "1.00 (1.00 to 1.00)"


def test_ratio_of_unpaired_rounds_is_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        ratio([1.0, 2.0], [1.0])


def test_machine_names_what_a_reader_needs():
    found = machine()
    assert found["device"] and found["processor"] and found["threads"] >= 1
    assert found["versions"]["torch"]
