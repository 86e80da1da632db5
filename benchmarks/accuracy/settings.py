"""How large the experiments are: in full, and quick enough for two slow cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

EXPERIMENTS = (
    "table1",
    "table3",
    "table2",
    "table5",
    "transfer",
    "sizes",
    "tops",
    "layers",
    "variants",
    "preset",
    "parameters",
    "combining",
)
FIRST_SEED = 42


@dataclass(frozen=True)
class Settings:
    """What is run. Sizes are upper bounds: a task with fewer examples gives all it has.

    models: the first has every cell, the others 0-shot, LoFiT, the candidates and some sizes of LoFiT and LoRA. seeds:
    how many, per task (`default` for the rest). epochs: of each step of LoFiT and of every peer. n_tuning: training
    examples set aside for tuning, 0 for none, with every method at its default settings. n_outside: questions of each
    task judged out of domain. candidates: variants of LoFiT that are asked to become a preset, on every model, with
    candidate_seeds on every task. selection_tasks, peer_tasks, transfer_tasks, sweep_tasks, parameter_tasks: the tasks
    of table 2, of table 3 and the variants, of the figure of other tasks' heads, of the figures of sizes and of top and
    of LoFiT combined with LoRA, and of accuracy per parameter.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[tuple[str, int], ...]
    train_size: int | None
    n_validation: int | None
    epochs: int
    n_tuning: int
    n_outside: int
    selection_tasks: tuple[str, ...]
    peer_tasks: tuple[str, ...]
    transfer_tasks: tuple[str, ...]
    sweep_tasks: tuple[str, ...]
    sizes: tuple[int, ...]
    tops: tuple[float, ...]
    parameter_tasks: tuple[str, ...]
    candidates: tuple[str, ...]
    candidate_seeds: int
    only: tuple[str, ...] = EXPERIMENTS

    def n_seeds(self, task: str) -> int:
        """How many seeds a task's cells have, from `FIRST_SEED` on."""
        counts = dict(self.seeds)
        return counts.get(task, counts["default"])


QUICK = Settings(
    models=("smollm2",),
    tasks=("clutrr", "mquake", "truthfulqa"),
    seeds=(("default", 1),),
    train_size=64,
    n_validation=48,
    epochs=3,
    n_tuning=0,
    n_outside=32,
    selection_tasks=("mquake",),
    peer_tasks=("clutrr", "mquake"),
    transfer_tasks=("clutrr", "mquake"),
    sweep_tasks=("mquake",),
    sizes=(16, 32, 64),
    tops=(0.01, 0.03, 0.1, 0.3),
    parameter_tasks=("mquake",),
    candidates=("lofit_both",),
    candidate_seeds=1,
)
FULL = Settings(
    models=("smollm2", "gemma3-270m"),
    tasks=("clutrr", "mquake", "truthfulqa"),
    seeds=(("default", 2), ("truthfulqa", 1)),
    train_size=300,
    n_validation=None,
    epochs=5,
    n_tuning=60,
    n_outside=100,
    selection_tasks=("clutrr", "mquake"),
    peer_tasks=("clutrr", "mquake", "truthfulqa"),
    transfer_tasks=("clutrr", "mquake", "truthfulqa"),
    sweep_tasks=("clutrr", "mquake"),
    sizes=(25, 50, 100, 200, 300),
    tops=(0.01, 0.03, 0.1, 0.2, 0.3),
    parameter_tasks=("clutrr", "mquake", "truthfulqa"),
    candidates=("lofit_both",),
    candidate_seeds=3,
)


def from_json(content: Mapping[str, object]) -> Settings:
    """The settings whose fields a JSON file holds. Raises ValueError for other keys than those."""
    if content.keys() != {field.name for field in fields(Settings)}:
        raise ValueError(f"these are no settings of the paper's experiments: {sorted(content)}")
    as_tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return Settings(**{**as_tuples, "seeds": tuple(tuple(pair) for pair in content["seeds"])})
