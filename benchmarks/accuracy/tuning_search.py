"""The search for a method's settings: a start grid, then beyond an edge until the best lies inside, then halfway.

Every method has RUNS different runs on a task and model, and up to MOST while its best lies at an end of what was
tried: nothing is known of what lies beyond. After the start grid each further run changes one setting of the best run
so far: to the next number beyond an end, and otherwise to halfway between it and its neighbours. Then it goes beyond
the ends of those that are as good as the best: which of equals is taken is chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RUNS, MOST = 6, 12
# the numbers that a search steps to, times powers of ten
_STEPS = (1.0, 2.0, 5.0)
# beyond an edge it steps at least that far, and between numbers closer than _CLOSE nothing is tried
_BEYOND, _CLOSE = 2.0, 1.15
# all heads are all there are
LARGEST = {"top": 1.0}


@dataclass(frozen=True)
class Tried:
    """A finished run. options: what it was asked for. settings: all it ran with. score: larger is better."""

    options: Mapping[str, object]
    settings: Mapping[str, object]
    score: tuple[float, ...]

    def value(self, key: str) -> float | None:
        """The number that a setting had; None for what is none, or not positive."""
        value = self.options.get(key, self.settings.get(key))
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        return float(value) if number else None


def best_of(tried: Sequence[Tried]) -> int:
    """The place of the run whose settings are taken: the highest score; of equals the fewest edges, then the first."""
    highest = max(one.score for one in tried)
    equal = [i for i, one in enumerate(tried) if one.score == highest]
    return min(equal, key=lambda i: len(edges(tried, tried[i])))


def edges(tried: Sequence[Tried], one: Tried) -> dict[str, str]:
    """By setting, "smallest" or "largest" where a run's number is that end of all numbers tried.

    A setting that was never varied has no ends, and the largest number there can be is none.
    """
    found = {}
    for key, numbers in _varied(tried).items():
        ends = {numbers[0]: "smallest", numbers[-1]: "largest"}
        if (value := one.value(key)) in ends and value != LARGEST.get(key):
            found[key] = ends[value]
    return found


def next_options(tried: Sequence[Tried], runs: int = RUNS, most: int = MOST) -> dict[str, object] | None:
    """What the next run is asked for; None after `runs`, or `most` at an edge, and where no number is left to try."""
    best, count = tried[best_of(tried)], _different(tried)
    asked = _outwards(tried, best)
    if asked is None and count < runs:
        asked = _between(tried, best)
    if asked is None and any(best.score):
        # where nothing is right all are equal, and say nothing of where to look
        equal = [one for one in tried if one.score == best.score]
        asked = next((options for one in equal if (options := _outwards(tried, one)) is not None), None)
    return asked if count < most else None


def _outwards(tried: Sequence[Tried], one: Tried) -> dict[str, object] | None:
    """The run with the first of its settings that lies at an end changed to the next number beyond."""
    for key, end in edges(tried, one).items():
        return {**one.options, key: _beyond(one.value(key), end, LARGEST.get(key, math.inf))}
    return None


def _between(tried: Sequence[Tried], best: Tried) -> dict[str, object] | None:
    """The best with a setting changed to halfway between it and a neighbour."""
    for key, numbers in _varied(tried).items():
        if (value := best.value(key)) is None:
            continue
        place = numbers.index(value)
        for neighbour in (*numbers[place + 1 : place + 2], *numbers[max(place - 1, 0) : place]):
            # no run had a number between two neighbours
            if max(value, neighbour) / min(value, neighbour) >= _CLOSE:
                return {**best.options, key: _halfway(value, neighbour)}
    return None


def _varied(tried: Sequence[Tried]) -> dict[str, list[float]]:
    """By setting, the numbers tried, ascending; of settings that had more than one."""
    numbers = {
        key: sorted({value for one in tried if (value := one.value(key)) is not None}) for key in _searched(tried)
    }
    return {key: values for key, values in numbers.items() if len(values) > 1}


def _searched(tried: Sequence[Tried]) -> list[str]:
    return list(dict.fromkeys(key for one in tried for key in one.options))


def _different(tried: Sequence[Tried]) -> int:
    """How many runs had settings of their own: a start grid may ask for what the task has anyway."""
    keys = _searched(tried)
    return len({tuple({**one.settings, **one.options}.get(key) for key in keys) for one in tried})


def _beyond(value: float, end: str, largest: float) -> float:
    power = math.floor(math.log10(value))
    numbers = [step * 10.0**n for n in range(power - 2, power + 3) for step in _STEPS]
    # a little room for numbers that have no exact binary form
    if end == "largest":
        found = min(number for number in numbers if number >= _BEYOND * value * 0.999)
    else:
        found = max(number for number in numbers if number <= value / _BEYOND * 1.001)
    return min(float(f"{found:.1g}"), largest)


def _halfway(value: float, neighbour: float) -> float:
    return float(f"{math.sqrt(value * neighbour):.2g}")
