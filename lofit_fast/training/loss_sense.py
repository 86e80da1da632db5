"""Losses that show that nothing is learned: said in a line of stderr, once each, and no error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

# of the loss of a guess, from which on a loss is about as bad
_ABOUT = 0.98


class LossSense:
    """Looks at a step's epochs.

    stage: the step. chance: the loss of a guess, or None where nobody knows it. epochs: of the step. say: with a line.
    """

    def __init__(self, stage: str, chance: float | None, epochs: int, say: Callable[[str], None] | None = None) -> None:
        self.stage, self.chance, self.epochs = stage, chance, epochs
        self.say = say or (lambda line: print(line, file=sys.stderr))
        self._said = False

    def saw(self, row: Mapping[str, object], first: Mapping[str, object]) -> None:
        """An epoch is over. row, first: its row of the history, and that of the step's first epoch."""
        loss = row["loss"]
        if not self._said and self.chance is not None and loss >= _ABOUT * self.chance:
            self._said = True
            self.say(
                f"warning: the loss of the step {self.stage!r} is {loss:.3f} in epoch {row['epoch']}, and that of a "
                f"guess is {self.chance:.3f}: look at the data, the base model and the learning rate"
            )
        if row["epoch"] == self.epochs and not self._said:
            # rows of early releases have no steps
            self._compare(row["step_losses"], first.get("step_losses") or [first["loss"]])

    def _compare(self, last: list[float], first: list[float]) -> None:
        # the first steps see vectors that hardly do anything; the last ones what has been learned
        untrained = _mean(first[: max(1, len(first) // 10)])
        ended = _mean(last[len(last) // 2 :])
        if ended >= untrained:
            self.say(
                f"warning: the loss of the step {self.stage!r} ended at {ended:.3f}, which is not below the "
                f"{untrained:.3f} that it began with: try another learning rate, or look at the data"
            )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
