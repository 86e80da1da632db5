"""In-context learning: the training examples go into the prompt, and nothing is trained."""

from dataclasses import replace

from lofit_fast.tasks.task import Example, Task, draw

# between one example and the next
SEPARATOR = "\n\n"


def few_shot(task: Task, k: int = 5, seed: int = 42) -> Task:
    """The task with k solved training examples before every validation prompt, or after the choices' shared prefix.

    The examples are drawn once (see `task.draw`), in their order, the same for all prompts; of preferences the chosen
    answer is shown. What is trained on stays as it is.
    Raises ValueError for fewer than k of them.
    """
    solved = [p.prompt + p.chosen for p in task.preferences] or [e.prompt + e.completion for e in task.train]
    shots = "".join(solved[i] + SEPARATOR for i in draw(len(solved), k, seed))
    asked = [Example(shots + e.prompt, e.completion, e.answers) for e in task.validation]
    prefix = task.shared_prefix + shots if task.choices else task.shared_prefix
    return replace(task, validation=asked, shared_prefix=prefix)
