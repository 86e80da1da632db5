"""Whether a variant of LoFiT has earned a preset: what it must gain over the paper's recipe, and whether it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.accuracy import findings
from benchmarks.accuracy.comparison import difference, enumerated
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.tables import Results

# points over LoFiT, and on how many tasks of every model
GAIN, TASKS = 3.0, 2
PRESET_SAYS = (
    f"A preset must gain {GAIN:g} points or more over the paper's recipe on {TASKS} tasks of every model, seeds"
    " averaged. Asked is what did so on the first model with its first seeds."
)


def preset_answer(slots: Sequence[Slot], results: Results) -> str:
    """Which candidates gain `GAIN` points on `TASKS` tasks of every model, and how each is beside LoFiT."""
    if not any(results.of(slot) for slot in slots):
        return findings.NOTHING
    earned, lost, open_ones = [], [], []
    models = dict.fromkeys(slot.model for slot in slots)
    for row in dict.fromkeys(slot.row for slot in slots if slot.row != "lofit"):
        gains = [_gains(slots, results, model, row) for model in models]
        found = earned if all(map(_enough, gains)) else open_ones if all(map(_open, gains)) else lost
        found.append(str(labelled(row)))
    seeds = max(len(slot.cells) for slot in slots)
    rule = f"{GAIN:g} points or more on {TASKS} tasks of {' and '.join(models)}, {seeds} seed{'s' * (seeds != 1)} each"
    texts = [
        f"{enumerated(names)} {verb} {rule}."
        for names, verb in ((earned, "gains"), (lost, "does not gain"), (open_ones, "may still gain"))
        if names
    ]
    return f"{' '.join(texts)} {findings.beside_lofit(slots, results)}"


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
