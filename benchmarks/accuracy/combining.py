"""LoFiT and LoRA together beside each alone: what the report says of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.accuracy import findings
from benchmarks.accuracy.comparison import ABOVE, Comparison, difference, enumerated, tally
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.tables import Results, markdown, score, timed_on, training_seconds

ALONE = ("lofit", "lora")
COMBINING_SAYS = (
    "Each row sees every example as often, LoFiT's step 1 aside, and nothing is tuned for the two together: LoFiT's"
    " settings are those tuned for LoFiT alone, LoRA's those tuned for LoRA alone.\n\n"
    "* **LoFiT on LoRA**: LoRA for half of the epochs; then it is frozen, and offsets are trained on top for the other"
    " half, on the heads that step 1 chose on the base model. Both can be merged into the weights.\n"
    "* **LoRA in the layers of LoFiT's heads**: LoRA for all epochs, but only in the layers in which step 1 chose at"
    " least one head.\n\n"
    "Seconds are with those of choosing heads."
)


def combining_answer(slots: Sequence[Slot], results: Results) -> str:
    """By combination, the tasks on which it is above both, and how it does beside each of the two."""
    if not any(results.of(slot) for slot in slots):
        return findings.NOTHING
    lines = []
    for row in dict.fromkeys(slot.row for slot in slots if slot.row not in ALONE):
        own = [slot for slot in slots if slot.row in (row, *ALONE)]
        name = str(labelled(row))
        comparisons = findings.comparisons_of(own, results, name, row, labelled)
        lines.append(f"* **{name}** {_above_both(comparisons)} {tally(name, comparisons)}")
        lines += [f"  * {one.sentence()}" for one in comparisons]
    return "\n".join(lines)


def combining_table(slots: Sequence[Slot], results: Results) -> str:
    """Each alone and every combination: accuracy, the differences with their intervals, parameters, seconds."""
    by_place = {(slot.row, slot.column): results.of(slot) for slot in slots}
    rows = []
    for (row, column), found in by_place.items():
        made = [None if row == one else difference(found, by_place.get((one, column), [])) for one in ALONE]
        rows.append(
            [
                str(labelled(row)),
                str(labelled(column)),
                score(found),
                *("" if one is None else one.words() for one in made),
                "" if not found else f"{fmean(result['n_parameters'] for result in found):,.0f}",
                "" if not found else f"{fmean(map(training_seconds, found)):.0f}",
                timed_on(found),
            ]
        )
    over = [f"points over {labelled(one)}, 95 % interval" for one in ALONE]
    return markdown(["", "task", "accuracy, %", *over, "parameters", "seconds", "timed on"], rows)


def _above_both(comparisons: Sequence[Comparison]) -> str:
    finished = {one.where: list(one.differences().values()) for one in comparisons}
    finished = {where: made for where, made in finished.items() if None not in made}
    if not finished:
        return "is finished beside both of them on no task."
    above = [where for where, made in finished.items() if all(one.verdict == ABOVE for one in made)]
    where = enumerated(above) if above else "no task"
    return f"is above both of them on {where}, with {len(finished)} of {len(comparisons)} tasks finished."
