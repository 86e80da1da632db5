"""What the script checks and what it times, as data, the most telling rows first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.speed.op.timed_row import TimedRow

SETTINGS = ("step 1", "step 2", "both", "few scales")


@dataclass(frozen=True)
class Check:
    """A case every path is checked on: a row of `lofit_kernels.shapes`, tokens, dtype, settings."""

    model: str
    T: int
    dtype: str
    settings: tuple[str, ...] = SETTINGS


# T that no tile divides; D = 64, 128, 256; N = 576 that no tile of 128 divides
CHECKS: dict[str, tuple[Check, ...]] = {
    "cuda": (
        Check("Llama-3-8B", 517, "bfloat16"),
        Check("Llama-3.2-1B", 129, "bfloat16"),
        Check("Gemma-7B", 200, "bfloat16"),
        Check("SmolLM2-135M", 77, "bfloat16"),
        Check("SmolLM2-135M", 1, "bfloat16", ("step 1", "step 2")),
        Check("Llama-3-8B", 77, "float16", ("both", "step 2")),
        Check("SmolLM2-135M", 200, "float32", ("both", "step 2")),
    ),
    "cpu": (Check("toy", 21, "bfloat16"), Check("toy", 5, "float32", ("both",))),
}


def _cuda_rows() -> Iterator[TimedRow]:
    small = ("Llama-3.2-1B", "Gemma-7B", "SmolLM2-135M")
    for level in ("projection", "layer"):
        for setting in ("step 1", "step 2"):
            yield TimedRow(level, "Llama-3-8B", setting, 4096)
    for model in small:
        for setting in ("step 1", "step 2"):
            yield TimedRow("projection", model, setting, 4096)
    for setting in ("both", "few scales"):
        yield TimedRow("projection", "Llama-3-8B", setting, 4096)
    for T in (512, 16384):
        for setting in ("step 1", "step 2"):
            yield TimedRow("projection", "Llama-3-8B", setting, T)
    for model in ("Llama-2-7B", *small):
        for setting in ("step 1", "step 2"):
            yield TimedRow("layer", model, setting, 4096)
    for model in small:
        for T in (512, 16384):
            for setting in ("step 1", "step 2"):
                yield TimedRow("projection", model, setting, T)
    for dtype in ("float16", "float32"):
        for setting in ("step 1", "step 2"):
            yield TimedRow("projection", "Llama-3-8B", setting, 4096, dtype)


# the output projections of Llama-2-7B and Llama-3-8B are alike: as projections they share their rows
ROWS: dict[str, tuple[TimedRow, ...]] = {
    "cuda": tuple(_cuda_rows()),
    "cpu": (TimedRow("projection", "toy", "step 1", 32), TimedRow("layer", "toy", "step 2", 32)),
}
QUICK = {"cuda": 4, "cpu": 2}
ROUNDS = {"cuda": 25, "cpu": 3}
# seconds a row may take
ROW_SECONDS = 12.0
