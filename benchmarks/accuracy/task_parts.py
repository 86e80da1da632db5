"""The part of a task that a cell trains on and is judged by: the same questions for every method and seed."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.experiments import Available
from benchmarks.accuracy.method_table import TASKS
from benchmarks.accuracy.paper_cells import TUNING
from benchmarks.accuracy.settings import FIRST_SEED
from lofit_fast.tasks import TASKS as LOADERS
from lofit_fast.tasks import Task, load_task
from lofit_fast.tasks.task import draw


class TaskData:
    """Tasks of a data folder, each read once. tokenizer: None for tasks that use none."""

    def __init__(self, folder: Path | str | None, tokenizer=None) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self._whole: dict[tuple, Task] = {}

    def part(self, name: str, *, train_size: int, n_judged: int, seed: int, split: str) -> Task:
        """`train_size` examples drawn from `seed`, and `n_judged` questions that are the same for all seeds.

        split: "validation" judges by the task's validation questions; "tuning" by questions of the training data,
        which are set aside before anything is drawn to train on.
        Raises ValueError for more than there is, and what the task's loader raises.
        """
        task = self._tuning(name, n_judged) if split == TUNING else self.whole(name)
        judged = ("choices" if task.choices else "validation"), task.choices or task.validation
        learnt = ("preferences" if task.preferences else "train"), task.preferences or task.train
        parts = {judged[0]: _drawn(judged[1], n_judged, FIRST_SEED), learnt[0]: _drawn(learnt[1], train_size, seed)}
        return replace(task, **parts)

    def whole(self, name: str, **options) -> Task:
        """All of a task."""
        key = (name, *options.items())
        if key not in self._whole:
            # a task for judging only comes from the hub where the folder has no file of it
            from_folder = _has(self.folder, name) if TASKS[name].outside else TASKS[name].needs_data
            data = self.folder if from_folder else None
            self._whole[key] = load_task(name, data, self.tokenizer, seed=FIRST_SEED, **options)
        return self._whole[key]

    def _tuning(self, name: str, size: int) -> Task:
        if "tuning_size" in inspect.signature(LOADERS[name]).parameters:
            return self.whole(name, tuning_size=size)
        task = self.whole(name)
        aside = set(draw(len(task.train), size, FIRST_SEED))
        rows = list(enumerate(task.train))
        train, judged = ([row for i, row in rows if (i in aside) == held_out] for held_out in (False, True))
        return replace(task, train=train, validation=judged)


def survey(tasks: tuple[str, ...], folder: Path | str | None, hub: bool = False) -> Available:
    """What the folder holds of the tasks, and which tasks for judging only have a file in it; with hub, all of those.

    Raises what the tasks' loaders raise for files that are missing or broken, ValueError for a task that is none.
    """
    if unknown := sorted(task for task in tasks if task not in TASKS or TASKS[task].outside):
        known = ", ".join(name for name, facts in TASKS.items() if not facts.outside)
        raise ValueError(f"got the tasks {', '.join(unknown)}, expected some of {known}")
    if folder is None and (needing := [task for task in tasks if TASKS[task].needs_data]):
        raise ValueError(f"{', '.join(needing)}: expected the folder of their data (--data)")
    data = TaskData(folder)
    whole = {task: data.whole(task) for task in tasks}
    outside = [name for name, facts in TASKS.items() if facts.outside]
    return Available(
        {name: len(task.preferences or task.train) for name, task in whole.items()},
        {name: len(task.choices or task.validation) for name, task in whole.items()},
        tuple(name for name in outside if hub or _has(folder, name)),
    )


def _has(folder: Path | str | None, name: str) -> bool:
    return folder is not None and (Path(folder) / f"{name}.jsonl").is_file()


def _drawn(rows, size: int, seed: int):
    kept = [rows[i] for i in draw(len(rows), size, seed)]
    return tuple(kept) if isinstance(rows, tuple) else kept
