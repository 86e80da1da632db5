"""The paper's tables in Markdown, from the cells that are there; a blank, and a count, for those that are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from benchmarks.accuracy.bootstrap import mean_and_spread
from benchmarks.accuracy.comparison import elsewhere, starred
from benchmarks.accuracy.experiments import TRAINED_FOR_OUTSIDE, Slot, labelled
from benchmarks.accuracy.method_table import METHODS, SELECTOR_LABELS, TASKS
from benchmarks.accuracy.paper_cells import Cell, CellFolder, main_metric
from benchmarks.accuracy.tuning import Tuning
from lofit_fast.heads import jaccard

# the key of a result whose settings may still change: their search is not over
OPEN = "open"
Rows = list[list[str]]
Naming = Callable[[object], str]


@dataclass(frozen=True)
class Counts:
    """Of cells. missing: without a result. open: with one that is not final, see `Results.of`."""

    planned: int
    missing: int
    open: int


@dataclass(frozen=True)
class Results:
    """What slots hold so far."""

    folder: CellFolder
    tuning: Tuning

    def of(self, slot: Slot) -> list[dict]:
        """The results of a slot's finished cells, by ascending seed; OPEN is true in those that are not final."""
        settled = [(cell, self.tuning.settled(cell, so_far=True)) for cell in slot.cells]
        found = [(cell, self.folder.result(best)) for cell, best in settled if best is not None]
        return [result | {OPEN: self._open(cell)} for cell, result in found if result is not None]

    def _open(self, cell: Cell) -> bool:
        return self.tuning.settled(cell) is None

    def judged(self, slot: Slot) -> list[dict]:
        """As `of`, with hits and metrics of the task in the slot's column where the cells are judged there as well."""
        found = self.of(slot)
        return elsewhere(found, slot.column) if slot.column in slot.cells[0].outside else found

    def counts(self, slots: Sequence[Slot]) -> Counts:
        """How many cells there are, each once under the best settings so far."""
        cells = [cell for slot in slots for cell in slot.cells]
        so_far = {self.tuning.settled(cell, so_far=True) or cell: cell for cell in cells}
        made = [cell for best, cell in so_far.items() if self.folder.result(best) is not None]
        return Counts(len(so_far), len(so_far) - len(made), sum(map(self._open, made)))


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A table; cells may hold anything but line breaks."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def percent(values: Sequence[float]) -> str:
    """Mean and, over several seeds, sample standard deviation of shares, in percent; "" for none."""
    if not values:
        return ""
    mean, spread = mean_and_spread([100 * value for value in values])
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def score(results: Sequence[dict], outside: str | None = None) -> str:
    """The main metric of some results, MC1 and MC2 where there are both; † where one is not final.

    outside: of that other task.
    """
    judged = [result if outside is None else result["outside"].get(outside) for result in results]
    judged = [one["metrics"] for one in judged if one is not None]
    if not judged:
        return ""
    shown = ("mc1", "mc2") if "mc2" in judged[0] and "exact_match" not in judged[0] else (main_metric(judged[0]),)
    mark = "†" if any(result.get(OPEN) for result in results) else ""
    return " / ".join(percent([metrics[name] for metrics in judged]) for name in shown) + mark


def training_seconds(result: dict) -> float:
    """Of choosing heads and of training."""
    return result["seconds"]["selection"] + result["seconds"]["training"]


def timed_on(results: Sequence[dict]) -> str:
    """The devices and engines that some results ran with: seconds compare among those of one alone."""
    made = [one["environment"] for one in results]
    return "; ".join(sorted({f"{one['device']}, engine {one['engine']}" for one in made}))


def accuracy_table(slots: Sequence[Slot], results: Results) -> str:
    """Methods by tasks (table 1): accuracy, starred where it differs from LoFiT's on the same questions."""
    models = list(dict.fromkeys(slot.model for slot in slots))
    tasks = list(dict.fromkeys(slot.column for slot in slots))
    rows = []
    for model in models:
        own = [slot for slot in slots if slot.model == model]
        for method in dict.fromkeys(slot.row for slot in own):
            cells = []
            for task in tasks:
                slot, lofit = (_at(own, name, task) for name in (method, "lofit"))
                cells.append("n/a" if slot is None else _starred(slot, lofit, results))
            rows.append([f"{METHODS[method].label}, {model}" if len(models) > 1 else METHODS[method].label, *cells])
    return markdown(["", *(_with_metric(task) for task in tasks)], rows)


def selection_table(slots: Sequence[Slot], results: Results) -> str:
    """Ways to choose heads (table 2): accuracy, seconds of choosing, overlap with LoFiT's choice of the same seed."""
    rows = []
    for slot in slots:
        found = results.of(slot)
        reference = {result["cell"]["seed"]: result["heads"] for result in results.of(_at(slots, "lofit", slot.column))}
        pairs = [(result["heads"], reference.get(result["cell"]["seed"])) for result in found]
        overlaps = [jaccard(_heads(first), _heads(second)) for first, second in pairs if second is not None]
        rows.append(
            [
                SELECTOR_LABELS[slot.row],
                labelled(slot.column),
                score(found),
                _mean(found, lambda result: result["seconds"]["selection"], "{:.1f}"),
                timed_on(found),
                f"{fmean(overlaps):.2f}" if overlaps else "",
                _mean(found, lambda result: len(result["heads"]), "{:.0f}"),
            ]
        )
    header = ["heads chosen by", "task", "accuracy, %", "seconds to choose", "timed on", "overlap (Jaccard)", "heads"]
    return markdown(header, rows)


def peers_table(slots: Sequence[Slot], results: Results) -> str:
    """Trained methods (table 3): accuracy, parameters, seconds of choosing heads and of training."""
    rows = []
    for slot in slots:
        found = results.of(slot)
        rows.append(
            [
                METHODS[slot.row].label,
                labelled(slot.column),
                score(found),
                _mean(found, lambda result: result["n_parameters"], "{:,.0f}"),
                _mean(found, training_seconds, "{:.0f}"),
                timed_on(found),
            ]
        )
    return markdown(["", "task", "accuracy, %", "parameters", "seconds", "timed on"], rows)


def outside_table(slots: Sequence[Slot], results: Results) -> str:
    """What models tuned on TruthfulQA still know (table 5): methods by tasks judged."""
    judged = list(dict.fromkeys(slot.column for slot in slots))
    rows = []
    for method in dict.fromkeys(slot.row for slot in slots):
        at = {task: results.of(_at(slots, method, task)) for task in judged}
        cells = [score(at[task], None if task == TRAINED_FOR_OUTSIDE else task) for task in judged]
        rows.append([METHODS[method].label, *cells])
    return markdown(
        [f"tuned on {labelled(TRAINED_FOR_OUTSIDE)}, judged on", *(_with_metric(task) for task in judged)], rows
    )


def grid_table(slots: Sequence[Slot], results: Results, rows: Naming = labelled, columns: Naming = labelled) -> str:
    """A figure's numbers: rows by columns, as the figure has them. rows, columns: what each is called."""
    across, down = (list(dict.fromkeys(getattr(slot, name) for slot in slots)) for name in ("column", "row"))
    if all(not isinstance(column, str) for column in across):
        across.sort()
    lines = []
    for row in down:
        at = [_at(slots, row, column) for column in across]
        lines.append([str(rows(row)), *("n/a" if slot is None else score(results.of(slot)) for slot in at)])
    return markdown(["", *(str(columns(column)) for column in across)], lines)


def layers_table(slots: Sequence[Slot], results: Results) -> str:
    """Where chosen heads are: heads, layers that hold them, the middle half's layers, overlap between seeds."""
    rows = []
    for slot in slots:
        found = results.of(slot)
        layers = sorted(layer for result in found for layer, _ in result["heads"])
        overlaps = [jaccard(_heads(a["heads"]), _heads(b["heads"])) for a, b in combinations(found, 2)]
        rows.append(
            [
                labelled(slot.column),
                _mean(found, lambda result: len(result["heads"]), "{:.0f}"),
                f"{layers[0]} to {layers[-1]}" if layers else "",
                "{} to {}".format(*middle_half(layers)) if layers else "",
                f"{fmean(overlaps):.2f}" if overlaps else "",
            ]
        )
    return markdown(["task", "heads", "layers", "layers of the middle half", "overlap between seeds (Jaccard)"], rows)


def middle_half(layers: Sequence[int]) -> tuple[int, int]:
    """The layers of the first and the last quartile of heads. layers: of every head, ascending."""
    return layers[len(layers) // 4], layers[(3 * len(layers) - 1) // 4]


def _starred(slot: Slot, lofit: Slot | None, results: Results) -> str:
    found = results.of(slot)
    theirs = results.of(lofit) if lofit is not None and lofit != slot else []
    if not found or not theirs:
        return score(found)
    return score(found) + starred(found, theirs)


def _at(slots: Sequence[Slot], row: str, column: object) -> Slot | None:
    return next((slot for slot in slots if (slot.row, slot.column) == (row, column)), None)


def _mean(found: Sequence[dict], value: Callable[[dict], float], text: str) -> str:
    return text.format(fmean(value(result) for result in found)) if found else ""


def _heads(pairs: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, head in pairs]


def _with_metric(task: str) -> str:
    return f"{labelled(task)}, {'exact match' if TASKS[task].written else 'MC1 / MC2'}, %"
