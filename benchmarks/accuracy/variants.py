"""Variants of LoFiT beside the paper's recipe: the algebra of each, and how far it is from LoFiT."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.accuracy.comparison import difference, p_value
from benchmarks.accuracy.experiments import Slot, labelled
from benchmarks.accuracy.tables import Results, markdown, score, timed_on, training_seconds

_HEADER = ("", "task", "accuracy, %", "points over LoFiT", "95 % interval", "p", "parameters", "seconds", "timed on")
VARIANTS_SAY = (
    "Every variant trains vectors on all heads at once, from the base model, in one step instead of two; each is tuned"
    " by the same rule as LoFiT, but over one setting, its rate, where LoFiT has three. Each is folded into the"
    " projection afterwards, so that it costs nothing more.\n\n"
    "* **All heads**: z -> z + v. A layer's edit adds one vector, the sum over heads of W_h v_h, to every token. One"
    " head reaches D dimensions of it; all heads reach as many as the layer has, in every layer.\n"
    "* **Scales kept**: z -> (1 + a) z + v. An offset is the same for every token. A scale adds what depends on the"
    " token, W (a * z).\n"
    "* **In units of the spread**: z -> z + s u, s the root of the head's mean variance over the tokens of the first"
    " batch. Adam's step has one size for all numbers, so a step of v is large for a head of small outputs and small"
    " for one of large ones; a step of u is the same share of either's spread.\n\n"
    "Differences, intervals and p are of the questions and seeds that both have. Seconds are with those of choosing"
    " heads."
)


def variants_table(slots: Sequence[Slot], results: Results) -> str:
    """LoFiT and every variant: accuracy, the difference with its interval and p, parameters, seconds."""
    by_place = {(slot.model, slot.row, slot.column): slot for slot in slots}
    several = len({slot.model for slot in slots}) > 1
    rows = []
    for (model, row, column), slot in by_place.items():
        found, lofit = results.of(slot), results.of(by_place[model, "lofit", column])
        made = None if row == "lofit" else difference(found, lofit)
        p = None if row == "lofit" else p_value(found, lofit)
        rows.append(
            [
                str(labelled(row)),
                str(labelled(column)) + f", {model}" * several,
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
