"""Which chosen settings lie at the edge of what tuning tried, so that better ones may lie outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.accuracy.comparison import enumerated
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.paper_cells import Cell
from benchmarks.accuracy.tables import Results, markdown, score


@dataclass(frozen=True)
class Choice:
    """The tuning runs of a method on a task and model, and the best so far; None while one of its start is missing.

    edges: "smallest" or "largest" by the best run's settings that are the end of the numbers tried. over: whether the
    search is finished.
    """

    runs: tuple[Cell, ...]
    best: Cell | None
    edges: dict[str, str]
    over: bool = True


def choices_made(slots: Sequence[Slot], results: Results) -> list[Choice]:
    """A choice for each method, task and model of the slots that is tuned."""
    groups = dict.fromkeys(tuple(results.tuning.runs(cell)) for slot in slots for cell in slot.cells)
    found = []
    for runs in groups:
        if runs:
            best = results.tuning.best(runs)
            at = {} if best is None else results.tuning.edges(runs, best)
            found.append(Choice(runs, best, at, results.tuning.over(runs)))
    return found


def edges_answer(choices: Sequence[Choice]) -> str:
    """How many methods have a choice at an edge, and which, from the finished choices alone."""
    made = [choice for choice in choices if choice.best is not None]
    if not made:
        return f"Nothing can be said yet: runs of all {len(choices)} choices are missing."
    methods = list(dict.fromkeys(choice.runs[0].method for choice in made))
    counts = {}
    for method in methods:
        own = [choice for choice in made if choice.runs[0].method == method]
        counts[method] = (sum(bool(choice.edges) for choice in own), len(own))
    at_edge = [method for method in methods if counts[method][0]]
    inside = [method for method in methods if not counts[method][0]]
    text = (
        f"{sum(bool(choice.edges) for choice in made)} of {len(made)} choices, of {len(at_edge)} of {len(methods)}"
        " methods, lie at an edge of what was tried"
    )
    if at_edge:
        each = enumerated([f"{labelled(method)} in {counts[method][0]} of {counts[method][1]}" for method in at_edge])
        text += f": {each}. Their best settings may lie outside"
    if inside:
        text += f". Every choice of {enumerated([labelled(method) for method in inside])} lies inside"
    waiting = len(choices) - len(made)
    waits = "waits" if waiting == 1 else "wait"
    going_on = sum(not choice.over for choice in made)
    text += "." + f" {going_on} of these searches are not over." * bool(going_on)
    return text + f" {waiting} more {waits} for missing runs." * bool(waiting)


def tuning_table(choices: Sequence[Choice], results: Results) -> str:
    """Every tuning run: method, task, what was tried, how it did, and the edges of the chosen one, which is bold."""
    rows = []
    for choice in choices:
        for run in choice.runs:
            found = results.folder.result(run)
            tried = ", ".join(f"{key} {value}" for key, value in run.options) or "as they are"
            mark = "**" if run == choice.best else ""
            done = f"{mark}{score([found])}{mark}" if found else ""
            sizes = f"{run.train_size} / {run.n_validation}"
            where = f"{labelled(run.task)}, {run.model}"
            at = ", ".join(f"{key} {end}" for key, end in choice.edges.items()) if run == choice.best else ""
            rows.append([labelled(run.method), where, f"{mark}{tried}{mark}", done, at, sizes])
    header = ["", "task", "settings tried", "accuracy, %", "at an edge", "trained on / judged by"]
    return markdown(header, rows) if rows else ""
