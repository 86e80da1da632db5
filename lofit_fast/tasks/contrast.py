"""A right and a wrong answer to the same prompt: what probes, directions and saliency are fitted on."""

import random
from collections import defaultdict
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
    answer of another training example otherwise. Drawn from `seed`, and never one that counts as correct, by any
    example or preference of the same prompt, as long as another is left.

    Raises:
        ValueError: a task without training data, or an example to which every other answer is correct.
    """
    drawn = random.Random(seed)
    if task.preferences:
        chosen = _correct((p.prompt, (p.chosen,)) for p in task.preferences)
        # of texts that are ranked, the middle ones are right in one row and wrong in another
        wrong = [[a for a in p.rejected if a not in chosen[p.prompt]] or p.rejected for p in task.preferences]
        pairs = zip(task.preferences, wrong, strict=True)
        return [Contrast(p.prompt, p.chosen, drawn.choice(some)) for p, some in pairs]
    if not task.train:
        raise ValueError(f"task {task.name!r} has no training examples, expected at least one")
    pool = task.candidates or sorted({example.completion for example in task.train})
    right = _correct((e.prompt, e.answers) for e in task.train)
    return [Contrast(e.prompt, e.completion, _wrong(e, right[e.prompt], pool, drawn)) for e in task.train]


def _correct(answers):
    """prompt -> every answer that counts as correct somewhere. answers: pairs of a prompt and its own."""
    found = defaultdict(list)
    for prompt, some in answers:
        found[prompt] += some
    return found


def _wrong(example, right, pool, drawn):
    for known in (right, example.answers):
        if wrong := [answer for answer in pool if not exact_match(answer, known)]:
            return drawn.choice(wrong)
    raise ValueError(f"no wrong answer to {example.prompt!r} among {list(pool)[:5]}")
