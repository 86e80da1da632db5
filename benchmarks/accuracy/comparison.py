"""How far two sets of results are apart on the same questions, and whether the questions can show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from benchmarks.accuracy.bootstrap import RESAMPLES, Resampled, paired_bootstrap, stars
from benchmarks.accuracy.method_table import METHODS

ABOVE, BELOW, LEVEL = "above", "below", "level"
NO_DIFFERENCE = "no difference that the questions can show"
# a bar in a picture is read to a point or so
_BAR_RESAMPLES = 2000

Hits = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Difference:
    """A mean difference in points, and its 95 % interval over seeds and questions."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ABOVE or BELOW when the interval leaves out 0, LEVEL when it holds it."""
        return ABOVE if self.low > 0 else BELOW if self.high < 0 else LEVEL

    def words(self) -> str:
        """The difference and its interval."""
        return f"{self.mean:+.1f}, {self.low:+.1f} to {self.high:+.1f}"


def difference(first: Sequence[dict], second: Sequence[dict]) -> Difference | None:
    """first - second on the same questions and seeds; None where they share no seed, or one has no result.

    What learns nothing answers the same whatever the seed, and counts for each of the other's.
    Raises ValueError when the two answer different numbers of questions.
    """
    pair = _of_shared_seeds(first, second)
    if pair is None:
        return None
    found = _resampled(*pair, RESAMPLES)
    mean = fmean(map(fmean, pair[0])) - fmean(map(fmean, pair[1]))
    # thirds of hits must not fall on either side of 0 by rounding
    return Difference(*(round(100 * value, 9) for value in (mean, found.low, found.high)))


def p_value(first: Sequence[dict], second: Sequence[dict]) -> float | None:
    """That of "the two do equally well", by the resamples that the interval of `difference` is of; None as there."""
    pair = _of_shared_seeds(first, second)
    return None if pair is None else _resampled(*pair, RESAMPLES).p


def starred(first: Sequence[dict], second: Sequence[dict]) -> str:
    """The stars of their p; "" where there is none."""
    p = p_value(first, second)
    return "" if p is None else stars(p)


def accuracy(found: Sequence[dict]) -> tuple[float, float, float]:
    """Mean hits in percent, and the ends of their 95 % interval over seeds and questions. At least one result."""
    hits = tuple(_by_seed(found).values())
    none = tuple((0.0,) * len(row) for row in hits)
    found = _resampled(hits, none, _BAR_RESAMPLES)
    mean = fmean(map(fmean, hits))
    # a bar must not have a length below 0 by rounding, nor leave what there is
    return 100 * mean, 100 * max(min(found.low, mean), 0.0), 100 * min(max(found.high, mean), 1.0)


def in_percent(found: Sequence[dict]) -> str:
    """An accuracy with its interval, in words."""
    mean, low, high = accuracy(found)
    return f"{mean:.1f} % ({low:.1f} to {high:.1f})"


@dataclass(frozen=True)
class Comparison:
    """One row beside others, on the same questions. where: in words. name, main: of the row. others: by their names."""

    where: str
    name: str
    main: Sequence[dict]
    others: Mapping[str, Sequence[dict]]

    def differences(self) -> dict[str, Difference | None]:
        """By the other's name; None while it cannot be made."""
        return {name: difference(self.main, found) for name, found in self.others.items()}

    def sentence(self) -> str:
        """How the row does, what it is above, below and level with, and what is missing."""
        if not self.main:
            return f"**{self.where}**: {self.name} is not finished, so nothing is said."
        by_verdict: dict[str | None, dict[str, Difference | None]] = {ABOVE: {}, BELOW: {}, LEVEL: {}, None: {}}
        for name, found in self.differences().items():
            by_verdict[found and found.verdict][name] = found
        parts = [f"**{self.where}**: {self.name} has {in_percent(self.main)}"]
        if above := by_verdict[ABOVE]:
            nearest = min(above, key=lambda name: above[name].mean)
            by = f"nearest: {nearest}, {above[nearest].words()}" if len(above) > 1 else above[nearest].words()
            parts.append(f"above {enumerated(above)} ({by})")
        if below := by_verdict[BELOW]:
            parts.append(f"below {_each(below)}")
        if level := by_verdict[LEVEL]:
            parts.append(f"{NO_DIFFERENCE} from {_each(level)}")
        if missing := by_verdict[None]:
            parts.append(f"not finished: {enumerated(missing)}")
        return "; ".join(parts) + "."


def tally(name: str, comparisons: Sequence[Comparison]) -> str:
    """In how many comparisons a row is above, below and level, and how many cannot be made yet."""
    found = [one for comparison in comparisons for one in comparison.differences().values()]
    made = [one.verdict for one in found if one is not None]
    waiting = len(found) - len(made)
    if not made:
        return f"Nothing can be said yet: cells of all {waiting} comparisons are missing."
    text = f"{_counted(len(made), 'comparison')}: {name} is above in {made.count(ABOVE)}, below in {made.count(BELOW)},"
    text += f" and in {made.count(LEVEL)} there is {NO_DIFFERENCE}."
    return text + f" Missing cells leave {_counted(waiting, 'more comparison')} open." * bool(waiting)


def enumerated(names: Sequence[str] | Mapping[str, object]) -> str:
    """Names with commas and an "and"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def elsewhere(found: Sequence[dict], task: str) -> list[dict]:
    """The results as judged out of domain on another task; those that were not judged there are left out."""
    return [{**result, **result["outside"][task]} for result in found if task in result["outside"]]


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" + "s" * (count != 1)


def _each(differences: Mapping[str, Difference]) -> str:
    return enumerated([f"{name} ({found.words()})" for name, found in differences.items()])


def _of_shared_seeds(first: Sequence[dict], second: Sequence[dict]) -> tuple[Hits, Hits] | None:
    """The hits of both on the seeds that both have; None where there are none."""
    one, other = _by_seed(first), _by_seed(second)
    if not one or not other:
        return None
    if not _learns(first):
        one = dict.fromkeys(other, next(iter(one.values())))
    elif not _learns(second):
        other = dict.fromkeys(one, next(iter(other.values())))
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    return tuple(one[seed] for seed in shared), tuple(other[seed] for seed in shared)


def _by_seed(found: Sequence[dict]) -> dict[int, tuple[float, ...]]:
    return {result["cell"]["seed"]: tuple(result["hits"]) for result in found}


def _learns(found: Sequence[dict]) -> bool:
    return METHODS[found[0]["cell"]["method"]].learns


# the same cells are in several sections
@lru_cache(maxsize=512)
def _resampled(first: Hits, second: Hits, resamples: int) -> Resampled:
    return paired_bootstrap(first, second, resamples=resamples)
