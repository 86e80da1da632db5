"""The paper's figures from the cells that are there, as PNG and SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.bootstrap import mean_and_spread, mean_hits, paired_bootstrap, stars
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.paper_cells import main_metric
from benchmarks.accuracy.tables import Results
from lofit_fast.plots import new_figure

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_NO_DATA = "no finished cell"


def transfer(slots: Sequence[Slot], results: Results, title: str):
    """Bars per task: offsets on heads chosen on each task; stars where they differ from the task's own heads."""
    tasks, sources = (list(dict.fromkeys(getattr(slot, name) for slot in slots)) for name in ("column", "row"))
    figure, axes = new_figure((2.2 + 2.0 * len(tasks), 3.6))
    width = 0.8 / len(sources)
    for number, source in enumerate(sources):
        for at, task in enumerate(tasks):
            found = _found(slots, results, source, task)
            if not found:
                continue
            mean, spread = _accuracy(found)
            x = at + (number - (len(sources) - 1) / 2) * width
            colour = _COLOURS[number % len(_COLOURS)]
            axes.bar(x, mean, width * 0.92, color=colour, label=_source(source) if at == 0 else None)
            if spread is not None:
                axes.errorbar(x, mean, yerr=spread, color="black", linewidth=1)
            own = _found(slots, results, task, task) if source != task else []
            if own:
                text = stars(paired_bootstrap(mean_hits(found), mean_hits(own)))
                axes.text(x, mean + (spread or 0.0), text, ha="center", va="bottom")
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

    def label(row: str) -> str:
        task, _, method = row.partition("/")
        return f"{labelled(method)}, {labelled(task)}"

    return _lines(slots, results, "training examples", title, label)


def tops(slots: Sequence[Slot], results: Results, title: str):
    """Accuracy over the number of heads tuned, a line per task."""
    return _lines(slots, results, "heads tuned", title, labelled, heads=True)


FIGURES = {"transfer": transfer, "layers": layers, "sizes": sizes, "tops": tops}


def save(figure, path: Path) -> None:
    """Write a figure as PNG and SVG, the same bytes every time. path: without an ending."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _lines(slots, results: Results, xlabel: str, title: str, label, heads: bool = False):
    figure, axes = new_figure((5.6, 3.6))
    for number, row in enumerate(dict.fromkeys(slot.row for slot in slots)):
        points = []
        for slot in slots:
            found = results.of(slot) if slot.row == row else []
            if found:
                x = len(found[0]["heads"]) if heads else slot.column
                points.append((x, *_accuracy(found)))
        if points:
            at, means, spreads = zip(*sorted(points), strict=True)
            colour = _COLOURS[number % len(_COLOURS)]
            yerr = None if None in spreads else spreads
            axes.errorbar(at, means, yerr=yerr, color=colour, marker="o", capsize=2, label=label(row))
            axes.set_xscale("log")
            axes.set_xticks(at, [str(x) for x in at])
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


def _accuracy(found: Sequence[dict]) -> tuple[float, float | None]:
    """Mean and spread of the main metric in percent."""
    return mean_and_spread([100 * result["metrics"][main_metric(result["metrics"])] for result in found])


def _source(row: str) -> str:
    return {"zero_shot": "0-shot", "random": "random heads"}.get(row, f"heads of {labelled(row)}")
