"""A sweep of four runs on one loaded model against four runs started one after another."""

from __future__ import annotations

from benchmarks.cells import Options
from benchmarks.providers import Absent


def measure(model: str, options: Options) -> dict:
    """Wall-clock of both, from the first command to the last adapter. Raises Absent: there is no sweep yet."""
    raise Absent("lofit-fast sweep is not in this checkout")
