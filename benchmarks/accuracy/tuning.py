"""Which settings a method runs with: the best of its tuning runs, on examples set aside from the training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.accuracy.method_table import METHODS, grid
from benchmarks.accuracy.paper_cells import TUNING, Cell, CellFolder, as_options, main_metric
from benchmarks.accuracy.settings import FIRST_SEED

Grid = Callable[[str], tuple[dict[str, object], ...]]


@dataclass(frozen=True)
class Tuning:
    """folder: of finished cells. held_out: training examples set aside, 0 for no tuning. train_size: of the main cells,
    per task. epochs: of each step. of: a method's settings to try."""

    folder: CellFolder
    held_out: int
    train_size: dict[str, int]
    epochs: int
    of: Grid = grid

    def runs(self, cell: Cell) -> list[Cell]:
        """The tuning cells that a cell waits for: of its model, task and method alone, so its kin share them."""
        if not self.held_out or not METHODS[cell.method].tuned:
            return []
        # a third of a small task at most
        held_out = min(self.held_out, self.train_size[cell.task] // 3)
        plain = replace(
            cell,
            seed=FIRST_SEED,
            train_size=self.train_size[cell.task] - held_out,
            n_validation=held_out,
            epochs=self.epochs if METHODS[cell.method].epochs else 0,
            selector="lofit" if cell.method == "lofit" else "",
            heads_from="",
            heads_size=0,
            outside=(),
            n_outside=0,
            split=TUNING,
        )
        return [replace(plain, options=as_options(settings)) for settings in self.of(cell.method)]

    def settled(self, cell: Cell) -> Cell | None:
        """The cell with its method's best settings, its own options kept; None while a tuning run is missing.

        The best has the highest main metric, then the highest sum of all metrics; of equals the first is taken.
        """
        runs = self.runs(cell)
        if not runs:
            return cell
        best = self.best(runs)
        return best and replace(cell, options=as_options({**dict(best.options), **dict(cell.options)}))

    def best(self, runs: Sequence[Cell]) -> Cell | None:
        """The tuning run whose settings are taken; None while one is missing."""
        results = [self.folder.result(run) for run in runs]
        if None in results:
            return None
        return runs[max(range(len(runs)), key=lambda i: (_score(results[i]), -i))]


def _score(result: dict) -> tuple[float, float]:
    metrics = result["metrics"]
    return metrics[main_metric(metrics)], sum(metrics.values())
