"""Whether a variant of LoFiT has earned a preset: what it must gain over LoFiT as tuned, and whether it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.accuracy import findings
from benchmarks.accuracy.comparison import difference
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.tables import Results

# points over LoFiT by the mean, and on how many tasks of every model
GAIN, TASKS = 3.0, 2
PRESET_SAYS = (
    f"A preset must gain {GAIN:g} points or more over LoFiT on {TASKS} tasks of every model, by the mean over seeds,"
    " which is a rule for choosing and no proof: the intervals say what the questions show. LoFiT is as its search left"
    " it, which may have chosen all heads: there the gain is that of the scales alone. Differences are of the questions"
    " and seeds that both have. In the full run, what is asked was picked on these questions, with the first two seeds"
    " of the first model; the other seeds and the other model are new."
)


def preset_answer(slots: Sequence[Slot], results: Results) -> str:
    """Which candidates gain `GAIN` points on `TASKS` tasks of every model, and how each is beside LoFiT."""
    if not any(results.of(slot) for slot in slots):
        return findings.NOTHING
    models, seeds = dict.fromkeys(slot.model for slot in slots), max(len(slot.cells) for slot in slots)
    rule = f"{GAIN:g} points or more on {TASKS} tasks of {' and '.join(models)}, {seeds} seed{'s' * (seeds != 1)} each"
    text = ""
    for row in dict.fromkeys(slot.row for slot in slots if slot.row != "lofit"):
        gains = [_gains(slots, results, model, row) for model in models]
        verdict = (
            "gains" if all(map(_enough, gains)) else "may still gain" if all(map(_open, gains)) else "does not gain"
        )
        text += f"{labelled(row)} {verdict} {rule}. "
    return text + findings.beside_lofit(slots, results)


def _enough(gains: Iterable[float | None]) -> bool:
    return sum(gain is not None and gain >= GAIN for gain in gains) >= TASKS


def _open(gains: Iterable[float | None]) -> bool:
    """Whether missing cells may still bring what a preset needs."""
    return sum(gain is None or gain >= GAIN for gain in gains) >= TASKS


def _gains(slots: Sequence[Slot], results: Results, model: str, row: str) -> list[float | None]:
    """By task, what a candidate has over LoFiT in points; None where a seed or the search of either is missing."""
    own = {(slot.row, slot.column): slot for slot in slots if slot.model == model}
    gains = []
    for column in dict.fromkeys(column for _, column in own):
        pair = [own[name, column] for name in (row, "lofit")]
        made = difference(*map(results.of, pair)) if all(_whole(slot, results) for slot in pair) else None
        gains.append(made and made.mean)
    return gains


def _whole(slot: Slot, results: Results) -> bool:
    """Whether every seed is finished, with settings that no search will change."""
    settled = [results.tuning.settled(cell) for cell in slot.cells]
    return all(cell is not None and results.folder.result(cell) is not None for cell in settled)
