"""The figure of accuracy over trained numbers, and over training seconds, a column of panels per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.accuracy.comparison import accuracy
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.tables import Results
from benchmarks.accuracy.trained_sizes import SizePoint, of_one_device, of_one_size, size_points
from lofit_fast.plots import new_figure

# a colour for every method that may stand in it
_MARKERS = "osD^vP*Xp<>"
_COLOURS = (
    *("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple"),
    *("tab:brown", "tab:pink", "tab:grey", "tab:olive", "tab:cyan"),
    *("black", "navy", "gold"),
)


def parameters(slots: Sequence[Slot], results: Results, title: str):
    """Accuracy over trained numbers above, a line per method, and over seconds below; hollow for other models."""
    own, points = of_one_size(slots), size_points(slots, results)
    tasks = list(dict.fromkeys(slot.cells[0].task for slot in own)) or [""]
    kinds = list(dict.fromkeys((slot.cells[0].model, slot.cells[0].method) for slot in own))
    figure, panels = new_figure((1.6 + 3.0 * len(tasks), 6.0), columns=len(tasks), rows=2)
    for number, task in enumerate(tasks):
        upper, lower = panels[:, number] if len(tasks) > 1 else panels
        there = [point for point in points if point.task == task]
        _panel(upper, there, kinds, lambda point: point.numbers, labelled(task), joined=True)
        device, timed = of_one_device(there)
        _panel(lower, timed, kinds, lambda point: point.seconds, f"{labelled(task)}\n{device or 'no device'}")
        upper.set_xlabel("trained numbers")
        lower.set_xlabel("seconds of training")
        upper.set_xscale("log")
        upper.minorticks_off()
    for axes in panels.flat:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels.flat[0].set_ylabel("accuracy, %")
    panels.flat[len(tasks)].set_ylabel("accuracy, %")
    # each method once, as the first panel that has it
    legend: dict[str, object] = {}
    for axes in panels.flat:
        for one, name in zip(*axes.get_legend_handles_labels(), strict=True):
            legend.setdefault(name, one)
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _panel(
    axes,
    points: Sequence[SizePoint],
    kinds: Sequence[tuple[str, str]],
    across: Callable[[SizePoint], float],
    title: str,
    joined: bool = False,
) -> None:
    methods = list(dict.fromkeys(method for _, method in kinds))
    for model, method in kinds:
        own = sorted((point for point in points if (point.model, point.method) == (model, method)), key=across)
        if not own:
            continue
        first = model == kinds[0][0]
        means, lows, highs = zip(*(accuracy(point.results) for point in own), strict=True)
        below = [mean - low for mean, low in zip(means, lows, strict=True)]
        above = [high - mean for mean, high in zip(means, highs, strict=True)]
        number = methods.index(method)
        axes.errorbar(
            [across(point) for point in own],
            means,
            yerr=[below, above],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markerfacecolor=None if first else "white",
            # sizes of a method take much the same seconds: a line through them would be a tangle
            linestyle="none" if not joined else "-" if first else "--",
            capsize=2,
            label=labelled(method) + ("" if first else f", {model}"),
        )
    if not points:
        axes.text(0.5, 0.5, "no finished cell", ha="center", transform=axes.transAxes)
    axes.set_title(title, fontsize=9)
