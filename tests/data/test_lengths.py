"""Length-grouped batches: every example once, little padding, random order, the same for the same seed."""

import random

import pytest

from lofit_fast.data.lengths import GroupedByLength, longest_first

# 100 of any length and 8 short ones
LENGTHS = random.Random(1).choices(range(20, 200), k=100) + random.Random(2).choices(range(20, 40), k=8)


def drawn(epoch=0, seed=42, batch_size=8, lengths=LENGTHS):
    sampler = GroupedByLength(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padded(batches, lengths=LENGTHS):
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 108])
def test_grouping_draws_every_example_once(count):
    batches = drawn(lengths=LENGTHS[:count])
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [8] * ((count - 1) // 8)


def test_grouping_leaves_little_padding():
    plain = list(range(len(LENGTHS)))
    random.Random(3).shuffle(plain)
    shuffled = padded([plain[i : i + 8] for i in range(0, len(plain), 8)])
    for epoch in range(5):
        assert padded(drawn(epoch)) - sum(LENGTHS) < 0.3 * (shuffled - sum(LENGTHS))


def test_grouping_is_random_but_repeatable():
    assert drawn() == drawn()
    assert drawn() != drawn(epoch=1) != drawn(seed=43)
    firsts = [max(LENGTHS[i] for i in batch) for batch in drawn()]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))
    # not only the order of the batches differs, also who shares one
    assert {frozenset(batch) for batch in drawn()} != {frozenset(batch) for batch in drawn(epoch=1)}


def test_grouping_begins_with_the_longest_batch():
    for epoch in range(5):
        longest = [max(LENGTHS[i] for i in batch) for batch in drawn(epoch)[:-1]]
        assert longest[0] == max(longest)


def test_grouping_leaves_out_any_length_for_the_last_batch():
    rests = {min(LENGTHS[i] for i in drawn(epoch)[-1]) for epoch in range(8)}
    assert len(rests) > 2


def test_grouping_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size: got 0, expected a whole number from 1"):
        GroupedByLength(LENGTHS, 0, 42)


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_no_row_are_refused(size):
    with pytest.raises(ValueError, match=f"batch_size: got {size}, expected a whole number from 1"):
        list(longest_first(LENGTHS, size, "x", False))
