"""Which settings a method runs with: the best of its tuning runs, on examples set aside from the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.accuracy import tuning_search
from benchmarks.accuracy.cell_settings import OF_STEP2
from benchmarks.accuracy.method_table import LOFIT_DEFAULTS, METHODS, grid
from benchmarks.accuracy.paper_cells import TUNING, Cell, CellFolder, as_options, main_metric
from benchmarks.accuracy.settings import FIRST_SEED
from benchmarks.accuracy.tuning_search import MOST, RUNS, Tried

Grid = Callable[[str], tuple[dict[str, object], ...]]


@dataclass(frozen=True)
class Tuning:
    """folder: of finished cells. held_out: training examples set aside, 0 for no tuning. train_size: of the main cells,
    per task. epochs: of each step. of: the settings with which a method's search starts. n_runs: of a whole search.
    most: of one whose best lies at an edge."""

    folder: CellFolder
    held_out: int
    train_size: dict[str, int]
    epochs: int
    of: Grid = grid
    n_runs: int = RUNS
    most: int = MOST

    def runs(self, cell: Cell) -> list[Cell]:
        """The tuning cells of a cell, as far as they are known: of its model, task and method alone, shared by its kin.

        The start grid, and of the search the runs that follow from those that are finished.
        """
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
            some_heads=False,
        )
        runs = [replace(plain, options=as_options(settings)) for settings in self.of(cell.method)]
        while (options := self._next(runs)) is not None:
            runs.append(replace(plain, options=as_options(options)))
        return runs

    def over(self, runs: Sequence[Cell]) -> bool:
        """Whether a search, of which `runs` are known, is finished."""
        return all(self.folder.result(run) is not None for run in runs)

    def unknown(self, runs: Sequence[Cell]) -> int:
        """How many runs a search may have beside those that are known."""
        return 0 if self.over(runs) else max(self.n_runs - len(runs), 0)

    def settled(self, cell: Cell, so_far: bool = False) -> Cell | None:
        """The cell with the best settings of its method, or of those it borrows from, its own options kept.

        None while a tuning run is missing. so_far: take the best of the finished runs, once the start grid is. The best
        has the highest main metric, then the highest sum of all metrics; of equals see `tuning_search.best_of`.
        """
        chosen: dict[str, object] = {}
        # a method that borrows has no runs of its own: it waits for theirs, which their own cells ask for
        for method in METHODS[cell.method].borrows or (cell.method,):
            runs = self.runs(replace(cell, method=method))
            if not runs:
                continue
            best = self.best(runs, cell.some_heads) if so_far or self.over(runs) else None
            if best is None:
                return None
            chosen |= dict(best.options)
        if cell.heads_from:
            # as chosen there: step 1 has the settings that are the best on the task whose heads they are
            source = self.settled(replace(cell, task=cell.heads_from, heads_from="", heads_size=0, options=()), so_far)
            if source is None:
                return None
            chosen = {key: value for key, value in chosen.items() if key in OF_STEP2}
            chosen |= {key: value for key, value in source.options if key not in OF_STEP2}
        chosen |= dict(cell.options)
        if METHODS[cell.method].kind == "lofit":
            # a number of heads that it has anyway makes no other cell
            chosen = {key: value for key, value in chosen.items() if LOFIT_DEFAULTS.get(key) != value}
        return replace(cell, options=as_options(chosen), some_heads=False)

    def best(self, runs: Sequence[Cell], some_heads: bool = False) -> Cell | None:
        """The finished run whose settings are taken; None while one of the start grid is missing.

        some_heads: not one with all heads.
        """
        finished = [run for run in runs if self.folder.result(run) is not None]
        if len(finished) < len(self.of(runs[0].method)):
            return None
        if some_heads:
            finished = [run for run in finished if dict(run.options).get("top") != tuning_search.LARGEST["top"]]
        return finished[tuning_search.best_of([self._tried(run) for run in finished])]

    def edges(self, runs: Sequence[Cell], best: Cell) -> dict[str, str]:
        """By setting, which end of the numbers tried a finished run has; see `tuning_search.edges`."""
        tried = [self._tried(run) for run in runs if self.folder.result(run) is not None]
        return tuning_search.edges(tried, self._tried(best))

    def _next(self, runs: Sequence[Cell]) -> dict[str, object] | None:
        if not self.over(runs):
            return None
        return tuning_search.next_options([self._tried(run) for run in runs], self.n_runs, self.most)

    def _tried(self, run: Cell) -> Tried:
        result = self.folder.result(run)
        metrics = result["metrics"]
        settings = dict(as_options(result["settings"]))
        return Tried(dict(run.options), settings, (metrics[main_metric(metrics)], sum(metrics.values())))


def settled_so_far(cells: Iterable[Cell], tuning: Tuning) -> list[Cell]:
    """Each cell once, with the best settings so far; one that has none yet stands as it is."""
    return list(dict.fromkeys(tuning.settled(cell, so_far=True) or cell for cell in cells))
