"""Tasks: data -> prompts -> metric. Importing this imports neither torch nor transformers nor datasets."""

import inspect
from collections.abc import Callable
from pathlib import Path

from lofit_fast.tasks import clutrr, completion, kinship, mquake, open_domain, truthfulqa
from lofit_fast.tasks.task import Example, Task, exact_match, majority_accuracy

__all__ = ["TASKS", "Example", "Task", "exact_match", "load_task", "majority_accuracy"]

# name -> loader. What a loader needs and takes is read from its own signature: a new task is one row here.
TASKS: dict[str, Callable[..., Task]] = {
    "clutrr": clutrr.clutrr,
    "completion": completion.completion,
    "kinship": kinship.kinship,
    "mmlu": open_domain.mmlu,
    "mquake": mquake.mquake,
    "nq_open": open_domain.nq_open,
    "triviaqa": open_domain.triviaqa,
    "truthfulqa": truthfulqa.truthfulqa,
}


def load_task(
    name: str,
    data: str | Path | None = None,
    tokenizer=None,
    train_size: int | None = None,
    seed: int = 42,
    progress: bool = False,
    **options,
) -> Task:
    """Loads a task by name.

    Args:
        name: a key of `TASKS`.
        data: the file, folder or data set of tasks that read one.
        tokenizer: passed to the tasks that use one (chats); the others ignore it.
        train_size: number of training examples; None leaves it to the task.
        seed: of what the task draws at random.
        progress: whether a bar shows slow reading, of tasks that have one; the others ignore it.
        options: anything else the loader takes, by name (`validation=`, `split=`, `subset=` and `columns=` of
            completion, `validation_size=` of kinship and the open-domain tasks, `tuning_size=` of truthfulqa).

    Raises:
        ValueError: an unknown name, an option the task does not take, or one it needs and did not get; and what the
            loader itself raises.
    """
    if name not in TASKS:
        raise ValueError(f"got the task {name!r}, expected one of: {', '.join(sorted(TASKS))}")
    loader = TASKS[name]
    takes = inspect.signature(loader).parameters
    given = {"data": data, "train_size": train_size, "seed": seed, **options}
    given = {option: value for option, value in given.items() if value is not None}
    if unknown := sorted(given.keys() - takes.keys()):
        raise ValueError(f"task {name!r}: got {', '.join(unknown)}, expected only: {', '.join(takes)}")
    given |= {name: value for name, value in (("tokenizer", tokenizer), ("progress", progress)) if name in takes}
    needed = [option for option, parameter in takes.items() if parameter.default is parameter.empty]
    if missing := [option for option in needed if option not in given]:
        raise ValueError(f"task {name!r} needs {', '.join(missing)}, got none")
    return loader(**given)
