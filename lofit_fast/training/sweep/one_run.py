"""One training of a sweep: run -> row of the sweep's table, on a base that is loaded once."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch import nn

from lofit_fast.models.load import load_model
from lofit_fast.tasks import Task, load_task
from lofit_fast.training.fit import fit_objective
from lofit_fast.training.objectives import objective_of
from lofit_fast.training.run_folder import dtype_of_run
from lofit_fast.training.summary import write_summary
from lofit_fast.training.sweep.grid import Grid, Run

# of a run's summary, what a row shows, where it is there
SHOWN = ("accuracy_after_select", "accuracy_after_tune", "loss", "eval_loss", "n_heads", "wall_seconds")


class Runner:
    """run -> row, on one loaded base and the task's data, loaded once.

    folder: the sweep's. base: (model, tokenizer) if they are loaded already. options: of `fit_objective`.
    Raises ValueError or OSError for a model or data that cannot be used.
    """

    def __init__(self, grid: Grid, folder: Path, base: tuple[nn.Module, object] | None = None, **options) -> None:
        self.grid, self.folder = grid, folder
        self.options = {"engine": grid.engine, "step1_dir": folder / "step1", **options}
        self.model, self.tokenizer = (
            load_model(grid.model, dtype=self._dtype(), device=grid.device) if base is None else base
        )
        self._tasks = {size: self._task(size) for size in {run.train_size for run in grid.runs}}
        if not all(task.train or task.preferences for task in self._tasks.values()):
            raise ValueError(f"the task {grid.task} has nothing to train on: a sweep wants completions or preferences")

    def _dtype(self) -> str:
        """The grid's; where that is left to the machine, the dtype that runs of this folder were begun in."""
        if self.grid.dtype != "auto" or not self.options.get("resume", True):
            return self.grid.dtype
        begun = (dtype_of_run(self.folder / "runs" / run.name) for run in self.grid.runs)
        return next(filter(None, begun), "auto")

    def _task(self, size: int | None) -> Task:
        grid = self.grid
        how = {"train_size": size, "seed": grid.data_seed, "progress": self.options.get("progress", True)}
        return load_task(grid.task, grid.data, self.tokenizer, **how, **grid.reading)

    def __call__(self, run: Run) -> dict[str, object]:
        """Train one run, or take it as it is; a failure becomes a row too."""
        row = {"name": run.name, **run.varied}
        folder, task = self.folder / "runs" / run.name, self._tasks[run.train_size]
        started = time.perf_counter()
        try:
            how = {"output_dir": folder, "heads": run.heads, **self.options}
            result = fit_objective(self.model, self.tokenizer, objective_of(task), run.recipe, **how)
            try:
                summary = self._summary(folder, result, run, time.perf_counter() - started)
            finally:
                result.handle.unpatch()
        # one run's failure, of whatever kind, is no reason to lose the others
        except Exception as error:
            return {**row, "status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        row |= {"status": "done", **{key: summary[key] for key in SHOWN if summary.get(key) is not None}}
        return {**row, "chosen_heads": summary["heads"]}

    def _summary(self, folder: Path, result, run: Run, seconds: float) -> dict[str, object]:
        """The summary a run has left, or a new one."""
        path = folder / "summary.json"
        if path.is_file():
            return json.loads(path.read_text())
        last = result.history[-1] if result.history else {}
        losses = {key: last[key] for key in ("loss", "eval_loss") if key in last}
        grid = self.grid
        return write_summary(
            folder,
            result,
            model=grid.model,
            task=grid.task,
            recipe=run.recipe,
            data_seed=grid.data_seed,
            wall_seconds=seconds,
            **losses,
        )
