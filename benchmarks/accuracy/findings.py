"""The answer of each section, in sentences that follow by rule from the finished cells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from benchmarks.accuracy.comparison import (
    BELOW,
    LEVEL,
    NO_DIFFERENCE,
    Comparison,
    accuracy,
    difference,
    enumerated,
    in_percent,
    tally,
)
from benchmarks.accuracy.experiments import TRAINED_FOR_OUTSIDE, Slot, labelled
from benchmarks.accuracy.figures import heads_of
from benchmarks.accuracy.method_table import SELECTOR_LABELS
from benchmarks.accuracy.tables import Naming, Results, middle_half
from lofit_fast.heads import jaccard

NOTHING = "Nothing can be said yet: no cell is finished."


def beside_lofit(slots: Sequence[Slot], results: Results) -> str:
    """LoFiT beside every other row, per task and model."""
    return _beside("LoFiT", comparisons_of(slots, results, "LoFiT", "lofit", labelled))


def ways_to_choose(slots: Sequence[Slot], results: Results) -> str:
    """Heads by step 1 beside heads chosen in other ways."""
    name = "LoFiT's own choice"
    return _beside(name, comparisons_of(slots, results, name, "lofit", lambda row: SELECTOR_LABELS[row]))


def own_heads(slots: Sequence[Slot], results: Results) -> str:
    """Heads chosen on the task itself beside heads of other tasks and random ones."""
    name = "the task's own choice of heads"
    tuned = [slot for slot in slots if slot.row != "zero_shot"]
    return _beside(name, comparisons_of(tuned, results, name, None, heads_of))


def out_of_domain(slots: Sequence[Slot], results: Results) -> str:
    """LoFiT tuned on one task beside the others, on other tasks; where the base knows nothing, that alone."""
    comparisons, silent = [], []
    for comparison in comparisons_of(slots, results, "LoFiT", "lofit", labelled):
        base = comparison.others.get(labelled("zero_shot"))
        if comparison.where == labelled(TRAINED_FOR_OUTSIDE):
            continue
        if base and not any(hit for result in base for hit in result["hits"]):
            silent.append(f"{comparison.where} (0 of {len(base[0]['hits'])})")
        else:
            comparisons.append(comparison)
    lines = []
    if silent:
        lines.append(f"On {enumerated(silent)} the base model answers nothing, so a loss could not be seen there.")
    if comparisons:
        lines.append(_beside("LoFiT", comparisons))
    return "\n\n".join(lines) or NOTHING


def where_heads_are(slots: Sequence[Slot], results: Results) -> str:
    """The layers of the middle half of the chosen heads, and how much the choices of seeds and tasks share."""
    lines, chosen = [], {}
    for slot in slots:
        found, name = results.of(slot), labelled(slot.column)
        if not found:
            lines.append(f"* **{name}**: no cell is finished.")
            continue
        layers = sorted(layer for result in found for layer, _ in result["heads"])
        first, last = middle_half(layers)
        own = [_pairs(result) for result in found]
        text = f"* **{name}**: the middle half of the chosen heads is in layers {first} to {last} (of {layers[0]} to"
        text += f" {layers[-1]} that hold any)"
        if len(own) > 1:
            text += (
                f"; choices of two seeds share {fmean(jaccard(a, b) for a, b in combinations(own, 2)):.2f} (Jaccard)"
            )
        lines.append(text + ".")
        chosen[name] = own
    if len(chosen) > 1:
        shared = [
            f"{one} and {other} {fmean(jaccard(a, b) for a in chosen[one] for b in chosen[other]):.2f}"
            for one, other in combinations(chosen, 2)
        ]
        lines.append(f"* Choices of two tasks share (Jaccard): {enumerated(shared)}.")
    return "\n".join(lines) if chosen else NOTHING


def more_examples(slots: Sequence[Slot], results: Results) -> str:
    """What each method gains from its smallest to its largest training size, and the two beside each other at each."""
    lines = []
    by_row = {row: _finished(slots, results, row) for row in dict.fromkeys(slot.row for slot in slots)}
    for row, found in by_row.items():
        task, _, method = row.partition("/")
        name, sizes = f"**{labelled(task)}, {labelled(method)}**", sorted(found)
        if len(sizes) < 2:
            only = f"only {sizes[0]} examples are finished" if sizes else "no size is finished"
            lines.append(f"* {name}: {only}, so nothing is said.")
            continue
        few, many = sizes[0], sizes[-1]
        gain = difference(found[many], found[few])
        lines.append(
            f"* {name}: {in_percent(found[few])} with {few} examples, {in_percent(found[many])} with {many}:"
            f" {_moved(gain)}."
        )
    if not any(by_row.values()):
        return NOTHING
    comparisons = []
    for lofit in (row for row in by_row if row.endswith("/lofit")):
        task = lofit.partition("/")[0]
        own: list[Comparison] = []
        for size in dict.fromkeys(slot.column for slot in slots if slot.row == lofit):
            rest = [row for row in by_row if row.startswith(f"{task}/") and row != lofit]
            others = {labelled(row.partition("/")[2]): by_row[row].get(size, []) for row in rest}
            own.append(Comparison(str(size), "LoFiT", by_row[lofit].get(size, []), others))
        made = [(one.where, other, found) for one in own for other, found in one.differences().items() if found]
        if made:
            each = enumerated([f"{other} with {size} ({found.words()})" for size, other, found in made])
            lines.append(f"* **{labelled(task)}**: LoFiT beside {each}.")
        comparisons += own
    return f"LoFiT beside LoRA at the same number of examples. {tally('LoFiT', comparisons)}\n\n" + "\n".join(lines)


def more_heads(slots: Sequence[Slot], results: Results) -> str:
    """The most accurate number of heads of each task, and the fewest that the questions do not tell apart from it."""
    lines = []
    rows = list(dict.fromkeys(slot.row for slot in slots))
    by_row = {row: _finished(slots, results, row) for row in rows}
    for row, found in by_row.items():
        name = f"* **{labelled(row)}**"
        if len(found) < 2:
            lines.append(f"{name}: {len(found)} of the numbers of heads finished, so nothing is said.")
            continue
        best = max(found, key=lambda top: (accuracy(found[top])[0], -top))
        level = [top for top in sorted(found) if _verdict(found[top], found[best]) == LEVEL]
        text = f"{name}: the most accurate is {_share(best, found)}, {in_percent(found[best])}"
        lower = [top for top in found if top < level[0] and _verdict(found[top], found[best]) == BELOW]
        if level[0] == best:
            text += "; nothing smaller keeps up" if lower else ""
        else:
            beside = difference(found[level[0]], found[best])
            text += f"; the fewest that keep up are {_share(level[0], found)} ({beside.words()} points)"
        if lower:
            text += f"; {enumerated([_share(top, found) for top in sorted(lower)])} are below"
        if best == max(found):
            text += ". The most accurate is the most that were tried, so more may do better"
        lines.append(text + ".")
    return "\n".join(lines) if any(by_row.values()) else NOTHING


def _beside(name: str, comparisons: Sequence[Comparison]) -> str:
    """The count of all comparisons, then a line each."""
    return tally(name, comparisons) + "\n\n" + "\n".join(f"* {one.sentence()}" for one in comparisons)


def comparisons_of(
    slots: Sequence[Slot], results: Results, name: str, main: str | None, rows: Naming
) -> list[Comparison]:
    """One per model and column. main: the row beside the others; None for the row named as the column is."""
    several = len({slot.model for slot in slots}) > 1
    found = []
    for model, column in dict.fromkeys((slot.model, slot.column) for slot in slots):
        own = {slot.row: results.judged(slot) for slot in slots if (slot.model, slot.column) == (model, column)}
        first = own.pop(column if main is None else main, [])
        where = f"{labelled(column)}, {model}" if several else str(labelled(column))
        found.append(Comparison(where, name, first, {str(rows(row)): theirs for row, theirs in own.items()}))
    return found


def _finished(slots: Sequence[Slot], results: Results, row: str) -> dict:
    """By column, the results of a row's slots that have any."""
    found = {slot.column: results.of(slot) for slot in slots if slot.row == row}
    return {column: there for column, there in found.items() if there}


def _verdict(first: Sequence[dict], second: Sequence[dict]) -> str | None:
    made = difference(first, second)
    return made and made.verdict


def _moved(gain) -> str:
    if gain is None:
        return "on other seeds, so nothing is said"
    return f"{gain.words()} points" + (f", {NO_DIFFERENCE}" if gain.verdict == LEVEL else "")


def _share(top: float, found: dict) -> str:
    return f"{100 * top:g} % ({len(found[top][0]['heads'])} heads)"


def _pairs(result: dict) -> list[tuple[int, int]]:
    return [(layer, head) for layer, head in result["heads"]]
