"""Accuracy beside the number of trained numbers: the points, and what is best at each power of ten."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.accuracy.comparison import BELOW, LEVEL, accuracy, difference, enumerated, in_percent
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.method_table import METHODS, SIZES
from benchmarks.accuracy.tables import Results, markdown, score, timed_on, training_seconds

# what the answer speaks of, tried or not
POWERS = (3, 4, 5)


@dataclass(frozen=True)
class SizePoint:
    """A method at one number of trained numbers. results: by ascending seed, at least one."""

    model: str
    task: str
    method: str
    numbers: int
    results: tuple[dict, ...]

    @property
    def power(self) -> int:
        """The nearest power of ten, on a logarithmic axis."""
        return round(math.log10(self.numbers))

    @property
    def seconds(self) -> float:
        """Of choosing heads and of training, mean over seeds."""
        return fmean(map(training_seconds, self.results))

    @property
    def devices(self) -> set[str]:
        """What its cells ran on, and how."""
        return {timed_on([one]) for one in self.results}

    @property
    def label(self) -> str:
        """Method and size in words."""
        return f"{labelled(self.method)} with {self.numbers:,}"

    @property
    def size(self) -> str:
        """What sets its size, in words; "" for a method of one size."""
        first, sizes = self.results[0], SIZES.get(self.method)
        if first["heads"]:
            return f"{len(first['heads'])} heads"
        value = sizes and first["cell"]["options"].get(sizes.option, sizes.default)
        return "" if value is None else _in_words(self.method, [value])


def of_one_size(slots: Sequence[Slot]) -> list[Slot]:
    """The slots of methods trained by gradients, on all examples, with heads chosen by step 1 on the same task."""

    def whole(slot: Slot) -> bool:
        cell = slot.cells[0]
        plain = cell.selector in ("", "lofit") and not cell.heads_from
        return METHODS[cell.method].epochs and plain and cell.train_size == largest[cell.model, cell.task]

    largest: dict[tuple[str, str], int] = {}
    for cell in (cell for slot in slots for cell in slot.cells):
        largest[cell.model, cell.task] = max(cell.train_size, largest.get((cell.model, cell.task), 0))
    return [slot for slot in slots if whole(slot)]


def size_points(slots: Sequence[Slot], results: Results) -> list[SizePoint]:
    """A point per method and size, of the finished cells of `of_one_size`, by task and ascending size.

    Cells of one size and seed count once: the plan asks for some of them twice, as a default and by number of heads.
    """
    grouped: dict[tuple, dict[int, dict]] = {}
    for slot in of_one_size(slots):
        for result in results.of(slot):
            cell = result["cell"]
            key = (cell["model"], cell["task"], cell["method"], result["n_parameters"])
            grouped.setdefault(key, {}).setdefault(cell["seed"], result)
    points = [SizePoint(*key, tuple(by_seed[seed] for seed in sorted(by_seed))) for key, by_seed in grouped.items()]
    tasks = list(dict.fromkeys((point.model, point.task) for point in points))
    return sorted(points, key=lambda point: (tasks.index((point.model, point.task)), point.numbers, point.method))


@dataclass(frozen=True)
class Best:
    """The most accurate of some points, of equals the smallest, and the others beside it.

    level: those that the questions do not tell apart from it. lower: those they show to be below. open: the rest, which
    share too few seeds with it.
    """

    point: SizePoint
    level: list[SizePoint]
    lower: list[SizePoint]
    open: list[SizePoint]


def best_of(points: Sequence[SizePoint]) -> Best:
    """Which of one task's points is the most accurate. Raises ValueError for none."""
    best = max(points, key=lambda point: (accuracy(point.results)[0], -point.numbers))
    places: dict[str | None, list[SizePoint]] = {LEVEL: [], BELOW: [], None: []}
    for point in points:
        if point is not best:
            found = difference(point.results, best.results)
            # on the seeds they share the best of all may be the lower one: that says nothing of which is best
            places[found.verdict if found and found.verdict in places else None].append(point)
    return Best(best, places[LEVEL], places[BELOW], places[None])


def of_one_device(points: Sequence[SizePoint]) -> tuple[str | None, list[SizePoint]]:
    """The device that most points of a task ran on wholly, and those points: seconds compare among them alone."""
    devices = Counter(device for point in points if len(point.devices) == 1 for device in point.devices)
    if not devices:
        return None, []
    device = devices.most_common(1)[0][0]
    return device, [point for point in points if point.devices == {device}]


def size_answer(slots: Sequence[Slot], results: Results) -> str:
    """What is best at each power of ten, the fewest numbers that keep up with the best of all, and the quickest."""
    by_place = _by_place(slots, results)
    if not any(by_place.values()):
        return "Nothing can be said yet: no cell of a trained method is finished."
    tried = {point.power for points in by_place.values() for point in points}
    lines = []
    for power in sorted(tried | set(POWERS)):
        near = {place: [point for point in points if point.power == power] for place, points in by_place.items()}
        words = [f"{place}: {_best_words(points)}" for place, points in near.items() if points]
        if nothing := [place for place, points in near.items() if not points]:
            words.append(f"Nothing was tried, or it is not finished, on {enumerated(nothing)}.")
        lines.append(f"* **About 10^{power} trained numbers** ({_span(power)}). {' '.join(words)}")
    sentences: dict[str, Callable[[Sequence[SizePoint]], str]] = {"fewest": _fewest, "quickest": quickest}
    for title, sentence in sentences.items():
        places = [f"{place}: {sentence(points)}" for place, points in by_place.items() if len(points) > 1]
        if places:
            lines.append(f"* **The {title} that keep up** with the most accurate of a task. {' '.join(places)}")
    if open_ones := _unfinished(slots, results):
        lines.append(f"* **Planned and not finished**: {'; '.join(open_ones)}.")
    return "\n".join(lines)


def size_table(slots: Sequence[Slot], results: Results) -> str:
    """Every point: what sets its size, trained numbers, accuracy, seconds and the device they are of."""
    rows = [
        [
            labelled(point.method),
            f"{labelled(point.task)}, {point.model}",
            point.size,
            f"{point.numbers:,}",
            score(point.results),
            f"{point.seconds:.0f}",
            "; ".join(sorted(point.devices)),
        ]
        for point in size_points(slots, results)
    ]
    return markdown(["", "task", "size", "trained numbers", "accuracy, %", "seconds", "timed on"], rows)


def _by_place(slots: Sequence[Slot], results: Results) -> dict[str, list[SizePoint]]:
    """Points by task and model in words; places of the plan without a finished cell have none."""
    points = size_points(slots, results)
    several = len({slot.model for slot in slots}) > 1
    places: dict[tuple[str, str], str] = {}
    for slot in of_one_size(slots):
        cell = slot.cells[0]
        places[cell.model, cell.task] = labelled(cell.task) + f" ({cell.model})" * several
    return {words: [point for point in points if (point.model, point.task) == place] for place, words in places.items()}


def _unfinished(slots: Sequence[Slot], results: Results) -> list[str]:
    """Method and task, with the sizes that differ from the method's own, of slots without a finished cell."""
    found: dict[tuple[str, str, str], dict[float, None]] = {}
    for slot in of_one_size(slots):
        cell = slot.cells[0]
        if not results.of(slot):
            values = found.setdefault((cell.method, cell.task, cell.model), {})
            sizes = SIZES.get(cell.method)
            value = sizes and dict(cell.options).get(sizes.option)
            values |= {} if value is None else {value: None}
    return [
        f"{labelled(method)} on {labelled(task)}, {model}" + (f", {_in_words(method, list(values))}" if values else "")
        for (method, task, model), values in found.items()
    ]


def _in_words(method: str, values: Sequence[float]) -> str:
    """Sizes of a method, at least one."""
    sizes = SIZES[method]
    return sizes.says.format(enumerated([f"{100 * value:g} %" if sizes.share else f"{value:g}" for value in values]))


def _span(power: int) -> str:
    return f"{math.ceil(10 ** (power - 0.5)):,} to {math.floor(10 ** (power + 0.5)):,}"


def _best_words(points: Sequence[SizePoint]) -> str:
    if not points:
        return "nothing was tried or finished."
    if len(points) == 1:
        return f"only {points[0].label} is finished, {in_percent(points[0].results)}."
    best = best_of(points)
    text = f"{best.point.label} is best, {in_percent(best.point.results)}"
    words = {"not told apart from": best.level, "above": best.lower, "not compared with": best.open}
    for says, those in words.items():
        if those:
            text += f", {says} {enumerated([point.label for point in those])}"
    return text + "."


def _fewest(points: Sequence[SizePoint]) -> str:
    best = best_of(points)
    fewest = min([best.point, *best.level], key=lambda point: point.numbers)
    if fewest is best.point:
        smaller = any(point.numbers < fewest.numbers for point in points)
        return f"{fewest.label} is the most accurate, and nothing smaller {'keeps up' if smaller else 'is finished'}."
    beside = difference(fewest.results, best.point.results)
    return f"{fewest.label} ({beside.words()} points beside {best.point.label}, the most accurate)."


def quickest(points: Sequence[SizePoint]) -> str:
    """The quickest that keep up with the most accurate, in words; nothing of them where that was timed elsewhere."""
    device, timed = of_one_device(points)
    if len(timed) < 2:
        return "fewer than two were timed on one device."
    best = best_of(timed)
    if best.point is not best_of(points).point:
        return f"{best_of(points).point.label}, the most accurate, was timed on another device than most."
    first = min([best.point, *best.level], key=lambda point: point.seconds)
    text = f"{first.label} in {first.seconds:.0f} s"
    if first is not best.point:
        text += f", {best.point.label}, the most accurate, in {best.point.seconds:.0f} s"
    left_out = len(points) - len(timed)
    return text + f" ({device}{f'; {left_out} of another device left out' if left_out else ''})."
