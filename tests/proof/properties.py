"""Thousands of random stories of random models, see `stories.py`; a row of docs/reliability.md.

    python -m tests.proof.properties [--count 2000] [--minutes 60]

Each trial is 25 stories that hypothesis draws from a seed of its own; what fails is shrunk to its shortest form.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.proof.reliability.trial_journal import Proof, Trial, run
from tests.proof.drawn_stories import stories
from tests.proof.stories import tell

PROOF = Proof(
    "properties",
    10,
    "stories of random tiny models, heads, dtypes and wrappers (LoRA, quantized linears, gradient checkpointing, "
    "compiled layers): patch, train, disable, fold, save, load, merge, export, generate, unpatch in any order",
    "python -m tests.proof.properties",
)
STORIES = 25


def told(number: int) -> str | None:
    """What went wrong in the stories of this seed, in one line."""

    @seed(number)
    @settings(
        max_examples=STORIES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    # compilers take their time: in one of ten
    @given(stories(compiled=number % 10 == 9, longest=14))
    def each(story) -> None:
        if story[0].wrapper == "compiled":
            torch._dynamo.reset()
        tell(*story)

    try:
        each()
    # whatever it is: a story says what is to be refused
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def trials(options, root: Path) -> Iterator[Trial]:
    """`count` stories."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    for number in range(-(-options.count // STORIES)):
        at = options.seed * 1_000_000 + number
        yield Trial(f"stories of seed {at}", "stories", lambda n=at: told(n), tried=STORIES)


if __name__ == "__main__":
    run(PROOF, trials, 2000)
