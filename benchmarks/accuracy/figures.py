"""The paper's figures from the cells that are there, as PNG and SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.comparison import accuracy, starred
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.tables import Naming, Results
from lofit_fast.plots import new_figure

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_NO_DATA = "no finished cell"
# with a bar, on the left of its panel
_MISSING = "not finished"


def dots(slots: Sequence[Slot], results: Results, title: str, rows: Naming = labelled, main: str = "lofit"):
    """A panel per column, a line per row: accuracy with its interval. rows: what each is called. main: set apart."""
    columns = list(dict.fromkeys(slot.column for slot in slots))
    models = list(dict.fromkeys(slot.model for slot in slots))
    lines = list(dict.fromkeys((slot.model, slot.row) for slot in slots))
    names = [str(rows(row)) + f", {model}" * (len(models) > 1) for model, row in lines]
    size = (2.2 + 2.6 * len(columns), 1.3 + 0.28 * len(lines))
    figure, panels = new_figure(size, columns=len(columns))
    for number, (column, axes) in enumerate(zip(columns, [panels] if len(columns) == 1 else panels, strict=True)):
        for slot in (slot for slot in slots if slot.column == column):
            at, found = lines.index((slot.model, slot.row)), results.judged(slot)
            colour = _COLOURS[1] if slot.row == main else _COLOURS[0]
            if found:
                mean, low, high = accuracy(found)
                axes.errorbar(mean, at, xerr=[[mean - low], [high - mean]], color=colour, marker="o", capsize=2)
            else:
                axes.text(
                    0.02, at, _MISSING, color="grey", va="center", fontsize=7, transform=axes.get_yaxis_transform()
                )
        axes.set(xlabel="accuracy, %", ylim=(len(lines) - 0.5, -0.5))
        axes.set_xlim(left=0, right=max(10.0, axes.get_xlim()[1]))
        axes.set_title(labelled(column), fontsize=9)
        axes.set_yticks(range(len(lines)), names if number == 0 else [""] * len(lines), fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=9)
    return figure


def transfer(slots: Sequence[Slot], results: Results, title: str):
    """Bars per task: offsets on heads chosen on each task; stars where they differ from the task's own heads."""
    tasks, sources = (list(dict.fromkeys(getattr(slot, name) for slot in slots)) for name in ("column", "row"))
    figure, axes = new_figure((2.2 + 2.0 * len(tasks), 3.6))
    width, named = 0.8 / len(sources), set()
    for number, source in enumerate(sources):
        for at, task in enumerate(tasks):
            found, x = _found(slots, results, source, task), at + (number - (len(sources) - 1) / 2) * width
            if not found:
                axes.text(x, 0, _MISSING, color="grey", ha="center", va="bottom", fontsize=7, rotation=90)
                continue
            mean, low, high = accuracy(found)
            colour = _COLOURS[number % len(_COLOURS)]
            axes.bar(x, mean, width * 0.92, color=colour, label=None if source in named else heads_of(source))
            named.add(source)
            axes.errorbar(x, mean, yerr=[[mean - low], [high - mean]], color="black", linewidth=1)
            own = _found(slots, results, task, task) if source != task else []
            if own:
                axes.text(x, high, starred(found, own), ha="center", va="bottom")
    axes.set_xticks(range(len(tasks)), [f"tuned on {labelled(task)}" for task in tasks])
    _finish(axes, "", "accuracy, %", title)
    return figure


def layers(slots: Sequence[Slot], results: Results, title: str):
    """How many heads LoFiT chooses in every layer, per task, averaged over seeds."""
    figure, axes = new_figure((6.4, 3.4))
    for number, slot in enumerate(slots):
        found = results.of(slot)
        if not found:
            continue
        counts = Counter(layer for result in found for layer, _ in result["heads"])
        at = range(max(counts) + 1)
        values = [counts[layer] / len(found) for layer in at]
        axes.plot(
            at, values, color=_COLOURS[number % len(_COLOURS)], marker="o", markersize=3, label=labelled(slot.column)
        )
    _finish(axes, "layer", "heads chosen", title)
    return figure


def sizes(slots: Sequence[Slot], results: Results, title: str):
    """Accuracy over the number of training examples, a line per task and method."""
    return _lines(slots, results, "training examples", title, swept)


def tops(slots: Sequence[Slot], results: Results, title: str):
    """Accuracy over the number of heads tuned, a line per task."""
    return _lines(slots, results, "heads tuned", title, labelled, heads=True)


def save(figure, path: Path) -> None:
    """Write a figure as PNG and SVG, the same bytes every time. path: without an ending."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})
        # the places that were found for the first file hold for the second: finding them is most of the work
        figure.set_layout_engine("none")
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _lines(slots, results: Results, xlabel: str, title: str, label, heads: bool = False):
    figure, axes = new_figure((5.6, 3.6))
    ticks: set[float] = set()
    for number, row in enumerate(dict.fromkeys(slot.row for slot in slots)):
        points = []
        for slot in slots:
            found = results.of(slot) if slot.row == row else []
            if found:
                x = len(found[0]["heads"]) if heads else slot.column
                points.append((x, *accuracy(found)))
        if points:
            at, means, lows, highs = zip(*sorted(points), strict=True)
            colour = _COLOURS[number % len(_COLOURS)]
            ends = zip(means, lows, highs, strict=True)
            yerr = list(zip(*((mean - low, high - mean) for mean, low, high in ends), strict=True))
            axes.errorbar(at, means, yerr=yerr, color=colour, marker="o", capsize=2, label=label(row))
            ticks |= set(at)
    if ticks:
        axes.set_xscale("log")
        axes.set_xticks(sorted(ticks), [str(x) for x in sorted(ticks)])
        axes.minorticks_off()
    _finish(axes, xlabel, "accuracy, %", title)
    return figure


def _finish(axes, xlabel: str, ylabel: str, title: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        # beside the data: among bars there is no room that is always free
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    else:
        axes.text(0.5, 0.5, _NO_DATA, ha="center", transform=axes.transAxes)
    axes.set_ylim(bottom=0)


def _found(slots: Sequence[Slot], results: Results, row: str, column: object) -> list[dict]:
    slot = next((slot for slot in slots if (slot.row, slot.column) == (row, column)), None)
    return [] if slot is None else results.of(slot)


def swept(row: str) -> str:
    """A row of the figure of training sizes in words."""
    task, _, method = row.partition("/")
    return f"{labelled(method)}, {labelled(task)}"


def heads_of(row: str) -> str:
    """A row of the figure of other tasks' heads in words."""
    return {"zero_shot": "0-shot", "random": "random heads"}.get(row, f"heads of {labelled(row)}")
