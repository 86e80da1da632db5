"""What each part of the hour looks at, as data by device, the most telling rows first. "cpu" is a rehearsal."""

from __future__ import annotations

from itertools import product

from benchmarks.speed.gpu.gpu_rows import SETTINGS
from benchmarks.speed.gpu.gpu_session import Pace
from benchmarks.speed.op.timed_row import TimedRow

# the last has the layers of Llama-2-70B too
MODELS = ("Llama-3-8B", "Gemma-2-9B", "Llama-3.2-1B", "Llama-3-70B")
TOKENS = (4096, 512, 16384, 128)
# who is timed beside all paths of ours; the rest of `operators.OPERATORS` is in `make bench-gpu`
PEERS = ("floor", "hook", "compiled_hook")
FIRST, MORE = SETTINGS[:2], SETTINGS[2:]
TOY = {
    "op": (TimedRow("projection", "toy", "step 1", 32), TimedRow("projection", "toy", "step 2", 32)),
    "op-more": (TimedRow("projection", "toy", "both", 32),),
    "layer": (TimedRow("layer", "toy", "step 2", 32),),
}


def timed_rows(part: str, device: str) -> tuple[TimedRow, ...]:
    """The rows of "op" (steps 1 and 2), "op-more" (both components, few scales) or "layer"."""
    if device == "cpu":
        return TOY[part]
    if part == "layer":
        sizes = ((T, model) for T in (4096, 512) for model in MODELS)
        return tuple(TimedRow("layer", model, setting, T) for (T, model), setting in product(sizes, FIRST))
    rows = product(TOKENS, MODELS, FIRST if part == "op" else MORE)
    return tuple(TimedRow("projection", model, setting, T) for T, model, setting in rows)


PACE = {"cuda": Pace(25, 3.0), "cpu": Pace(3, 1.0)}
# whole models and the step they train
STEPS = tuple(product(("Llama-3-8B", "Gemma-2-9B"), ("step 1", "step 2")))
TRACED = (("Llama-3-8B", "step 1"), ("Llama-3-8B", "step 2"), ("Gemma-2-9B", "step 2"))
# rounds, examples per round, and seconds after which no new round begins
STEP_PACE = {
    "cuda": {"rounds": 9, "examples": 16, "seconds": 40.0},
    "cpu": {"rounds": 3, "examples": 8, "seconds": 5.0},
}
# (model, tokens, share of scaled heads) for autotune
TUNED = {
    "cuda": tuple(product(MODELS, (4096, 512), (1.0,))) + tuple(product(MODELS, (4096,), (0.1,))),
    "cpu": (("toy", 32, 1.0),),
}
