"""One training of a sweep: run -> row of the sweep's table, on a base that is loaded once."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

from torch import nn

from lofit_fast.files import as_json, read_json
from lofit_fast.models.load import load_model
from lofit_fast.patching.patched import handle_of
from lofit_fast.patching.seal import tensors_digest
from lofit_fast.tasks import Task, load_task
from lofit_fast.training.fit import fit_objective
from lofit_fast.training.objectives import objective_of
from lofit_fast.training.run_folder import held
from lofit_fast.training.run_source import source_of
from lofit_fast.training.summary import write_summary
from lofit_fast.training.sweep.grid import Grid, Run
from lofit_fast.training.sweep.sweep_folder import RUNS, STEP1

# of a run's summary, what a row shows, where it is there
SHOWN = ("accuracy_after_select", "accuracy_after_tune", "loss", "eval_loss", "n_heads", "wall_seconds")
# characters of an error in a row; some quote what they were given
_LONGEST_ERROR = 1000
# how long a process of a sweep that was killed may take to end, and let go of the run that it was in
_ENDING_SECONDS = 30.0


class Runner:
    """run -> row, on one loaded base and the task's data, loaded once.

    grid: with the dtype of all runs. folder: the sweep's. base: (model, tokenizer) if they are loaded already.
    options: of `fit_objective`.
    Raises ValueError or OSError for a model or data that cannot be used.
    """

    def __init__(self, grid: Grid, folder: Path, base: tuple[nn.Module, object] | None = None, **options) -> None:
        self.grid, self.folder = grid, folder
        self.options = {"engine": grid.engine, "step1_dir": folder / STEP1, **options}
        self.model, self.tokenizer = (
            load_model(grid.model, dtype=grid.dtype, device=grid.device) if base is None else base
        )
        self._tasks = {size: self._task(size) for size in {run.train_size for run in grid.runs}}
        if not all(task.train or task.preferences for task in self._tasks.values()):
            raise ValueError(f"the task {grid.task} has nothing to train on: a sweep wants completions or preferences")

    def _task(self, size: int | None) -> Task:
        grid = self.grid
        how = {"train_size": size, "seed": grid.data_seed, "progress": self.options.get("progress", True)}
        return load_task(grid.task, grid.data, self.tokenizer, **how, **grid.reading)

    def source(self, run: Run) -> dict[str, object]:
        """Where a run's data came from, as it keeps it."""
        return source_of(self._tasks[run.train_size], self.grid.data, self.grid.data_seed)

    def __call__(self, run: Run, resume: bool = True) -> dict[str, object]:
        """Train one run, or take it as it is; a failure becomes a row too. The base comes back bare in any case.

        resume: whether to go on with what its folder holds.
        """
        row = {"name": run.name, **run.varied}
        folder = self.folder / RUNS / run.name
        try:
            summary = self._trained(run, folder, resume)
            row |= {"status": "done", **{key: summary[key] for key in SHOWN if summary.get(key) is not None}}
            return {**row, "chosen_heads": summary["heads"]}
        # one run's failure, of whatever kind, is no reason to lose the others
        except Exception as error:
            hint = f" (without {folder} it is run again)" if has_ended(folder) else ""
            said = " ".join(str(error).split())[:_LONGEST_ERROR]
            return {**row, "status": "failed", "error": f"{type(error).__name__}: {said}{hint}"}
        finally:
            # a finished run that cannot be read may have got as far as its adapter
            if (handle := handle_of(self.model)) is not None:
                handle.unpatch()

    def _trained(self, run: Run, folder: Path, resume: bool) -> dict[str, object]:
        """The summary of a run that is done now."""
        started = time.perf_counter()
        how = {"output_dir": folder, "heads": run.heads, "resume": resume, **self.options}
        how["source"] = self.source(run)
        while True:
            try:
                objective = objective_of(self._tasks[run.train_size])
                result = fit_objective(self.model, self.tokenizer, objective, run.recipe, **how)
                return self._summary(folder, result, run, time.perf_counter() - started)
            except BlockingIOError:
                if time.perf_counter() - started > _ENDING_SECONDS:
                    raise
                time.sleep(0.1)

    def _summary(self, folder: Path, result, run: Run, seconds: float) -> dict[str, object]:
        """The summary that a run has left, if it is of this run; or a new one."""
        last = result.history[-1] if result.history else {}
        losses = {key: last[key] for key in ("loss", "eval_loss") if key in last}
        path = folder / "summary.json"
        if path.is_file():
            digest = tensors_digest(result.handle.vectors())
            known = {**losses, "heads": [list(pair) for pair in result.heads], "adapter_digest": digest}
            kept = _read_summary(path, known)
            if kept is not None:
                return kept
            warnings.warn(f"{path} is not what this run has left: written anew", stacklevel=2)
        grid = self.grid
        about = {"model": grid.model, "task": grid.task, "recipe": run.recipe, "data_seed": grid.data_seed}
        with held(folder, wait=True):
            return write_summary(folder, result, **about, wall_seconds=seconds, **losses)


def _read_summary(path: Path, known: dict[str, object]) -> dict[str, object] | None:
    """A summary that says of a run what is known of it, with numbers where a row shows some; None for any other."""
    try:
        summary = read_json(path)
        # an older one may lack a key
        told = as_json(summary)
        agrees = "heads" in told and all(told.get(key, value) == value for key, value in as_json(known).items())
        numbers = all(isinstance(summary.get(key), int | float | None) for key in SHOWN)
        return summary if agrees and numbers else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def has_ended(folder: Path) -> bool:
    """Whether a run folder holds a run that is done, or one that cannot be read."""
    path = folder / "state.json"
    try:
        return path.exists() and read_json(path)["stage"] == "done"
    except (OSError, ValueError, KeyError, TypeError):
        return True
