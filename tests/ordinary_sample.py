"""Which rows of a table are in the ordinary run: `make test` takes these, `make test-all` every one."""

from collections.abc import Callable, Sequence
from itertools import product

import pytest


def some_now(rows: Sequence, *now) -> list:
    """The rows as parameters: those that equal one of `now` stay in the ordinary run, the others are slow.

    A row is a value, or a tuple of them.
    """
    absent = [row for row in now if row not in rows]
    assert not absent, f"expected rows of the table, got {absent}"
    return [row if row in now else _slow(row) for row in rows]


def slow_if(late: Callable[..., bool], rows: Sequence) -> list:
    """The rows as parameters: those for which late(*row) is true are slow."""
    return [_slow(row) if late(*_values(row)) else row for row in rows]


def crossed(*axes: Sequence) -> list:
    """Every combination of the axes' values as parameters, an id each.

    The ordinary run takes as many as the longest axis has values: a diagonal, on which every value of every axis is.
    The others are slow. A value that is a tuple stands for several parameters.
    """
    sizes = [len(axis) for axis in axes]
    by_length = sorted(range(len(axes)), key=lambda axis: -sizes[axis])
    # axes would go in step: each but the longest moves on by one whenever it and those before it are gone through
    turns, turn = {by_length[0]: max(sizes)}, 1
    for axis in by_length[1:]:
        turns[axis] = turn = turn * sizes[axis]
    diagonal = {tuple((at + at // turns[axis]) % size for axis, size in enumerate(sizes)) for at in range(max(sizes))}
    found = []
    for place in product(*map(range, sizes)):
        values = [value for axis, at in zip(axes, place, strict=True) for value in _values(axis[at])]
        marks = () if place in diagonal else pytest.mark.slow
        found.append(pytest.param(*values, marks=marks, id="-".join(map(_name, values))))
    return found


def _values(row: object) -> tuple:
    return row if isinstance(row, tuple) else (row,)


def _slow(row: object):
    return pytest.param(*_values(row), marks=pytest.mark.slow)


def _name(value: object) -> str:
    return getattr(value, "__name__", None) or str(value)
