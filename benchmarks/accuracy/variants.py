"""Variants of LoFiT beside the paper's recipe: the algebra of each, and whether one has earned a preset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from benchmarks.accuracy import findings
from benchmarks.accuracy.bootstrap import mean_hits, paired_bootstrap
from benchmarks.accuracy.comparison import difference, enumerated
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.tables import Results, markdown, score, timed_on, training_seconds

# what a variant must gain, in points, on how many tasks, to become a preset
GAIN, TASKS = 3.0, 2
_HEADER = ("", "task", "accuracy, %", "points over LoFiT", "95 % interval", "p", "parameters", "seconds", "timed on")
VARIANTS_SAY = (
    "Every variant trains vectors on all heads at once, from the base model, in one step instead of two; each is tuned"
    " by the same search as LoFiT. Each is folded into the projection afterwards, so that it costs nothing more.\n\n"
    "* **All heads**: z -> z + v. A layer's edit adds one vector, the sum over heads of W_h v_h, to every token. One"
    " head reaches D dimensions of it; all heads reach as many as the layer has, in every layer.\n"
    "* **Scales kept**: z -> (1 + a) z + v. An offset is the same for every token. A scale adds what depends on the"
    " token, W (a * z).\n"
    "* **In units of the spread**: z -> z + s u, s the root of the head's mean variance over the tokens of the first"
    " batch. Adam's step has one size for all numbers, so a step of v is large for a head of small outputs and small"
    " for one of large ones; a step of u is the same share of either's spread.\n\n"
    "p: paired bootstrap over questions, seeds averaged, two-sided. Seconds are with those of choosing heads."
)


def variants_answer(slots: Sequence[Slot], results: Results) -> str:
    """LoFiT beside every variant, and which of them gains `GAIN` points on `TASKS` tasks of a model."""
    if not any(results.of(slot) for slot in slots):
        return findings.NOTHING
    winners, open_ones = [], []
    models = dict.fromkeys(slot.model for slot in slots)
    for row in dict.fromkeys(slot.row for slot in slots if slot.row != "lofit"):
        gains = {model: _gains(slots, results, model, row) for model in models}
        if all(sum(gain is not None and gain >= GAIN for gain in own.values()) >= TASKS for own in gains.values()):
            winners.append(str(labelled(row)))
        elif all(_open(own.values()) for own in gains.values()):
            open_ones.append(str(labelled(row)))
    rule = f"{GAIN:g} points or more on {TASKS} tasks of {' and '.join(models)}"
    text = f"{enumerated(winners)} gains {rule}." if winners else f"None of the finished variants gains {rule}."
    if open_ones:
        text += f" Missing cells may still change that for {enumerated(open_ones)}."
    return f"{text} {findings.beside_lofit(slots, results)}"


def _open(gains: Iterable[float | None]) -> bool:
    """Whether missing cells may still bring what a preset needs."""
    return sum(gain is None or gain >= GAIN for gain in gains) >= TASKS


def _gains(slots: Sequence[Slot], results: Results, model: str, row: str) -> dict[str | int | float, float | None]:
    """By task, what a variant has over LoFiT in points; None where either is not finished."""
    own = {(slot.row, slot.column): results.judged(slot) for slot in slots if slot.model == model}
    gains = {}
    for column in dict.fromkeys(column for _, column in own):
        made = difference(own.get((row, column), []), own.get(("lofit", column), []))
        gains[column] = None if made is None else made.mean
    return gains


def variants_table(slots: Sequence[Slot], results: Results) -> str:
    """LoFiT and every variant: accuracy, the difference with its interval and p, parameters, seconds."""
    by_place = {(slot.row, slot.column): slot for slot in slots}
    rows = []
    for (row, column), slot in by_place.items():
        found, lofit = results.of(slot), results.of(by_place["lofit", column])
        made = None if row == "lofit" else difference(found, lofit)
        p = None if made is None else paired_bootstrap(mean_hits(found), mean_hits(lofit))
        rows.append(
            [
                str(labelled(row)),
                str(labelled(column)),
                score(found),
                "" if made is None else f"{made.mean:+.1f}",
                "" if made is None else f"{made.low:+.1f} to {made.high:+.1f}",
                "" if p is None else f"{p:.4f}",
                "" if not found else f"{found[0]['n_parameters']:,}",
                "" if not found else f"{fmean(map(training_seconds, found)):.0f}",
                timed_on(found),
            ]
        )
    return markdown(_HEADER, rows)
