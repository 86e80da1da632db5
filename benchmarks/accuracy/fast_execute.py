"""Runs the cells of `fast_cells` through `fit`, as a user would; runs of one step 1 share it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.accuracy.estimate import FIXED, Estimate
from benchmarks.accuracy.execute import Executor
from benchmarks.accuracy.fast_cells import FastCell
from lofit_fast.evaluation.judge import judge
from lofit_fast.training.fit import fit_objective
from lofit_fast.training.objectives import objective_of
from lofit_fast.training.summary import environment

# tokens of an example, and of a question with its answer, roughly
_TOKENS = {"mquake": 38, "clutrr": 96, "truthfulqa": 90}
# tokens trained and judged a second, on two slow cores that others use too, with SmolLM2-135M
_TRAIN_RATE, _JUDGE_RATE = 250.0, 700.0
_SLOWER = {"gemma3-270m": 1.8}


class FastExecutor(Executor):
    """cell -> what its file holds: metrics, hits, heads, seconds, tokens, settings, environment, commit.

    A run that was killed goes on from its last epoch.
    """

    def _run(self, cell: FastCell, folder: Path) -> dict:
        sizes = {"train_size": cell.train_size, "n_judged": cell.n_validation, "seed": cell.seed, "split": cell.split}
        task = self.data.part(cell.task, **sizes)
        # judged once, at the end
        objective = objective_of(replace(task, validation=[]))
        how = {"engine": cell.engine(), "step1_dir": self.work / "step1", "progress": False}
        result = fit_objective(self.model, self.tokenizer, objective, cell.recipe(), output_dir=folder, **how)
        try:
            judged = judge(self.model, self.tokenizer, task)
        finally:
            result.handle.unpatch()
        metrics = result.metrics
        return {
            "metrics": judged.metrics,
            "hits": [float(hit) for hit in judged.hits],
            "heads": [list(pair) for pair in result.heads],
            "seconds": {stage: metrics[stage]["seconds"] for stage in metrics},
            "tokens": {stage: round(of["seconds"] * of["tokens_per_s"]) for stage, of in metrics.items()},
            "settings": asdict(cell.recipe()),
            "engine": asdict(cell.engine()),
            "environment": environment(self.model),
            **self.commit,
        }


class FastEstimate(Estimate):
    """Seconds of cells to come; see `Estimate`."""

    @staticmethod
    def _planned(cell: FastCell) -> float:
        recipe, length = cell.recipe(), _TOKENS.get(cell.task, 60)
        looks = {"lofit": recipe.select_epochs, "random": 0}.get(recipe.select, 1)
        if recipe.select_examples is not None:
            looks *= recipe.select_examples / cell.train_size
        trained = cell.train_size * length * (looks + recipe.tune_epochs)
        # a preference has two answers, and a reference for each
        trained *= 2.5 if cell.task == "truthfulqa" else 1
        seconds = trained / _TRAIN_RATE + cell.n_validation * length / _JUDGE_RATE
        return FIXED + seconds * _SLOWER.get(cell.model, 1.0)
