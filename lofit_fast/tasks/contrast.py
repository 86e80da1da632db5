"""A right and a wrong answer to the same prompt: what probes, directions and saliency are fitted on."""

import random
from dataclasses import dataclass

from lofit_fast.tasks.task import Task, exact_match


@dataclass(frozen=True)
class Contrast:
    """One prompt with a right and a wrong completion, written as an Example's completion is."""

    prompt: str
    right: str
    wrong: str


def contrasts(task: Task, seed: int = 42) -> list[Contrast]:
    """One per training example or preference, in their order.

    The wrong answer is a rejected one of a preference; another candidate where the set of answers is closed; and the
    answer of another training example otherwise. Drawn from `seed`, and never one that counts as correct.

    Raises:
        ValueError: a task without training data, or an example to which every other answer is correct.
    """
    drawn = random.Random(seed)
    if task.preferences:
        return [Contrast(p.prompt, p.chosen, drawn.choice(p.rejected)) for p in task.preferences]
    if not task.train:
        raise ValueError(f"task {task.name!r} has no training examples, expected at least one")
    pool = task.candidates or sorted({example.completion for example in task.train})
    return [Contrast(e.prompt, e.completion, _wrong(e, pool, drawn)) for e in task.train]


def _wrong(example, pool, drawn):
    wrong = [answer for answer in pool if not exact_match(answer, example.answers)]
    if not wrong:
        raise ValueError(f"no wrong answer to {example.prompt!r} among {list(pool)[:5]}")
    return drawn.choice(wrong)
