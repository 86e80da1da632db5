"""What the ordinary run takes of a table: of each axis every value, and the rows that are named."""

from itertools import product

import pytest

from tests.ordinary_sample import crossed, slow_if, some_now


def split(rows):
    """(values of the rows of the ordinary run, values of the slow ones)."""
    found = [], []
    for row in rows:
        marked = [mark.name for mark in row.marks] if hasattr(row, "marks") else []
        found[marked == ["slow"]].append(tuple(row.values) if hasattr(row, "values") else row)
    return found


@pytest.mark.parametrize(
    "axes", [("abcdefgh", "xyz", "01"), ("01", "xy", "abcd"), ("ab",), ("abc", "xyz"), ("ab", "xy", "01", "pq")]
)
def test_a_diagonal_has_every_value_of_every_axis(axes):
    now, slow = split(crossed(*axes))
    assert len(now) == max(map(len, axes))
    assert sorted([*now, *slow]) == sorted(product(*axes))
    assert [set(column) for column in zip(*now, strict=True)] == [set(axis) for axis in axes]


def test_short_axes_are_not_in_step():
    now, _ = split(crossed("abcdefgh", "xy", "01"))
    assert {(two, three) for _, two, three in now} == set(product("xy", "01"))


def test_a_tuple_stands_for_several_parameters():
    rows = crossed([(1, "a"), (2, "b")], [True, False])
    assert split(rows)[0] == [(1, "a", True), (2, "b", False)]
    assert [row.id for row in rows] == ["1-a-True", "1-a-False", "2-b-True", "2-b-False"]


def test_rows_are_named():
    assert split(some_now(["a", "b", "c"], "c")) == (["c"], [("a",), ("b",)])
    assert split(slow_if(lambda one, two: one < two, [(1, 2), (2, 1)])) == ([(2, 1)], [(1, 2)])
    with pytest.raises(AssertionError, match="expected rows of the table, got"):
        some_now(["a", "b"], "d")
