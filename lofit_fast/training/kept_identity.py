"""A run's identity as an earlier release has kept it, turned into what this one would have kept of the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lofit_fast.config import Recipe
from lofit_fast.training.base_of_run import as_now


def kept_as_now(now: Mapping[str, object], data_before: Mapping[str, object]) -> Callable[[dict], dict]:
    """A function that brings a kept identity up to date where it is that of the same run.

    now: today's identity. data_before: entries of it as earlier releases had them of the same data.
    """
    model_as_now = as_now(now["model"])

    def turned(before: dict) -> dict:
        data = {name: now[name] for name, value in data_before.items() if before.get(name) == value}
        return model_as_now({**before, **_as_floats(before), **data})

    return turned


def _as_floats(before: Mapping[str, object]) -> dict[str, object]:
    """The entries with numbers that were kept as they were given: 1 is 1.0 by now."""
    recipe, beta = before.get("recipe"), before.get("beta")
    found = {"recipe": Recipe.floats(recipe)} if isinstance(recipe, Mapping) else {}
    return {**found, "beta": float(beta)} if type(beta) is int else found
