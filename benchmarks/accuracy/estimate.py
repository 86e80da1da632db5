"""How long a cell will take: counts of examples over known rates, corrected by the cells already run."""

from __future__ import annotations

from benchmarks.accuracy.method_table import METHODS, TASKS
from benchmarks.accuracy.paper_cells import Cell

# of loading data, patching and checking the model, in seconds
FIXED = 2.0
# examples seen for each training example and epoch, or once for what is fitted without epochs: two forward passes
_PASSES = {
    "lofit": 2.0,
    "trained": 1.4,
    "fitted": 1.0,
    "few_shot": 0.0,
    # with LoFiT's step 1, which is there already
    "lofit_scaled": 1.2,
    "lofit_on_lora": 1.4,
    "lora_on_heads": 1.4,
}
# other work, in equivalents of a judged question: scoring 18 answers, reading five examples before each question
_JUDGING = {"majority": 0.0, "constrained": 1.0, "few_shot": 3.0}
# against SmolLM2-135M
_SLOWER = {"gemma3-270m": 1.8}
_FEWEST = 3


class Estimate:
    """Seconds of cells to come. Starts from the rates of `TASKS`; learns from what cells took."""

    def __init__(self) -> None:
        self.predicted = self.taken = 0.0
        self.cells = 0

    def seconds(self, cell: Cell) -> float:
        """Of one cell."""
        return self._planned(cell) * (self.taken / self.predicted if self.cells >= _FEWEST else 1.0)

    def learn(self, cell: Cell, seconds: float) -> None:
        """A cell took that long."""
        self.predicted += self._planned(cell)
        self.taken += seconds
        self.cells += 1

    @staticmethod
    def _planned(cell: Cell) -> float:
        facts, kind = TASKS[cell.task], METHODS[cell.method].kind
        # heads of another choice cost a pass over the data at most, and with another task's step 1 is there already
        passes = 1.3 if kind == "lofit" and (cell.selector != "lofit" or cell.heads_from) else _PASSES.get(kind, 0.0)
        training = cell.train_size * max(cell.epochs, 1) * passes / facts.train_rate
        judging = cell.n_validation * _JUDGING.get(kind, 1.0) / facts.judge_rate
        outside = sum(cell.n_outside / TASKS[task].judge_rate for task in cell.outside)
        return FIXED + (training + judging + outside) * _SLOWER.get(cell.model, 1.0)
