"""Step 1 without a training: the scores of one pass of gradients, by the engine that a training would have."""

from __future__ import annotations

import time
from contextlib import closing

from torch import Tensor

from lofit_fast.config import Recipe
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.placement import device_of
from lofit_fast.training.choice.ways import Untrained
from lofit_fast.training.cost import peak_memory, rates
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.device_queue import current, devices_of
from lofit_fast.training.objectives import EncodedObjective


def look(
    way: Untrained, handle: LofitHandle, data: EncodedObjective, recipe: Recipe, engine: Engine, progress: bool
) -> tuple[Tensor, dict[str, float]]:
    """((layers, heads) scores, what they took: seconds, tokens_per_s, examples_per_s, peak_memory_bytes).

    handle: with scales of zero on every head; nothing of it is changed. engine: a settled one where the way looks.
    """
    model, started = handle.model, time.perf_counter()
    with (
        current(device_of(model)),
        data.as_it_was(),
        prepared(model, engine),
        peak_memory(*devices_of(model)) as memory,
        # what they keep in the model goes where they are left early too
        closing(data.losses(handle, recipe, engine, progress)) as losses,
    ):
        scores = way.score(handle, losses, recipe)
    seconds = time.perf_counter() - started
    rows = data.looked_at(recipe) if way.looks else []
    examples = len(rows) * data.n_examples // len(data.rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return scores, {"seconds": seconds, **rates(examples, tokens, seconds), "peak_memory_bytes": memory.peak_bytes}
