"""What a benchmark run left: its summary and the cells of one machine, read from its JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.table import PEERS

# what the project promised of each ratio: (key, words, bound, whether the ratio should be at least the bound). Where
# nothing was promised the bound is None
TARGETS: dict[str, tuple[tuple[str, str, float | None, bool], ...]] = {
    "SmolLM2-135M": (
        ("vs_hook_as_run", "training step, hook LoFiT as its users run it / ours", 4.0, True),
        ("vs_hook_same_engine", "training step, hook LoFiT in our engine / ours", None, True),
        ("vs_lora_all_as_run", "training step, PEFT LoRA all-linear as its users run it / ours", 5.5, True),
        ("vs_floor", "training step, ours / frozen floor, same engine", 1.03, False),
        ("int8_speedup", "step 2, ours in full precision / ours with int8 products", 1.7, True),
        ("vs_hook_as_run_int8", "training step, hook LoFiT as its users run it / ours with int8 products", 3.3, True),
        ("answer_only_epoch_speedup", "epoch of step 2, vectors at all positions / from the answer on", 6.0, True),
        ("fast_run_vs_hook", "whole run, hook LoFiT as run / ours, --fast on answers alone", 5.0, True),
        ("fast_run_vs_lora_all", "whole run, 5 epochs of LoRA all-linear / ours, --fast on answers alone", 4.0, True),
        ("peak_memory_vs_hook", "peak memory, ours / hook as its users run it", 0.40, False),
        ("prefix_cache_speedup", "step 2 in the upper quarter of the layers, prefix cache off / on", 1.6, True),
        ("mc_scoring_speedup", "multiple-choice scoring, one forward per answer / ours", 8.0, True),
        ("sweep_speedup", "sweep of 4 runs in one process / 4 separate runs, runs per hour", 1.5, True),
        ("sweep_jobs_speedup", "sweep of 4 runs, a process per core / 4 separate runs, runs per hour", 1.5, True),
    ),
    "Gemma-3-270M": (
        ("vs_hook_as_run", "training step, hook LoFiT as its users run it / ours", 7.0, True),
        ("vs_hook_same_engine", "training step, hook LoFiT in our engine / ours", None, True),
        ("vs_lora_all_as_run", "training step, PEFT LoRA all-linear as its users run it / ours", 7.5, True),
        ("vs_floor", "training step, ours / frozen floor, same engine", 1.03, False),
        ("int8_speedup", "step 2, ours in full precision / ours with int8 products", 1.5, True),
        ("vs_hook_as_run_int8", "training step, hook LoFiT as its users run it / ours with int8 products", 7.0, True),
        ("answer_only_epoch_speedup", "epoch of step 2, vectors at all positions / from the answer on", 6.0, True),
        ("fast_run_vs_hook", "whole run, hook LoFiT as run / ours, --fast on answers alone", 8.0, True),
        ("fast_run_vs_lora_all", "whole run, 5 epochs of LoRA all-linear / ours, --fast on answers alone", 6.0, True),
        ("peak_memory_vs_hook", "peak memory, ours / hook as its users run it", 0.25, False),
        ("prefix_cache_speedup", "step 2 in the upper quarter of the layers, prefix cache off / on", 1.6, True),
        ("mc_scoring_speedup", "multiple-choice scoring, one forward per answer / ours", 8.0, True),
    ),
}
# a summary's key for the ratios that it has from other machines
ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class Target:
    """A promised ratio and what was measured.

    interval: the bracket of `timing.Ratio`, None where the ratio has none (memory). rounds: that it is of.
    elsewhere: the folder of the machine that it is of, None for the summary's own.
    """

    model: str
    key: str
    words: str
    bound: float | None
    at_least: bool
    value: float | None
    interval: tuple[float, float] | None
    rounds: int | None
    elsewhere: str | None = None

    @property
    def verdict(self) -> str:
        """Met or missed, where all of the bracket says the same as the median."""
        if self.value is None:
            return "not measured"
        if self.bound is None:
            return "no target"
        numbers = (self.value, *(self.interval or ()))
        holds = {number >= self.bound if self.at_least else number <= self.bound for number in numbers}
        return "not decided" if len(holds) > 1 else "met" if holds.pop() else "missed"


@dataclass(frozen=True)
class BenchResults:
    """summary: content of summary.json. cells: content of every cell file of its machine, by name."""

    summary: dict
    cells: dict[str, dict]

    @classmethod
    def read(cls, folder: Path | str) -> BenchResults:
        """Raises FileNotFoundError for a folder without summary.json, ValueError for files that are not such JSON."""
        folder = Path(folder)
        path = folder / "summary.json"
        if not path.is_file():
            raise FileNotFoundError(f"no benchmark results in {folder}: expected a summary.json, written by make bench")
        summary = _parsed(path)
        if "results" not in summary.get("meta", {}):
            raise ValueError(f"{path} is no benchmark summary: expected a key meta with the machine's results folder")
        files = sorted((folder / summary["meta"]["results"] / "cells").glob("*.json"))
        cells = [_parsed(file) for file in files]
        # a cell of other code or options belongs to another run than the summary
        current = {cell["cell"]: cell for cell in cells if cell["stamp"] == summary["meta"]["stamp"]}
        return cls(summary, current)

    def models(self) -> list[str]:
        """Models the summary speaks of."""
        return [key for key in self.summary if key != "meta"]

    def cell(self, name: str) -> dict | None:
        """A measured cell's content; None if it is not there, or absent."""
        found = self.cells.get(name)
        return None if found is None or "absent" in found else found

    def targets(self) -> list[Target]:
        """Every promise with its measurement."""
        rows = []
        for model in self.models():
            for key, words, bound, at_least in TARGETS.get(model, ()):
                of_model = self.summary[model]
                interval, elsewhere = of_model.get(f"{key}_interval"), of_model.get(ELSEWHERE, {}).get(key)
                found = (of_model.get(key), interval and tuple(interval), of_model.get(f"{key}_rounds"), elsewhere)
                rows.append(Target(model, key, words, bound, at_least, *found))
        return rows

    def timed(self, name: str) -> list[dict]:
        """Rows of a step-level cell that were timed against their floor."""
        return [row for row in (self.cell(name) or {}).get("rows", []) if "vs_floor" in row]

    def missing(self) -> list[tuple[str, str]]:
        """(what, why) for all that is absent, was not run, or was not timed because its loss was wrong."""
        rows = [(name, cell["absent"]) for name, cell in self.cells.items() if "absent" in cell]
        for name, cell in self.cells.items():
            for row in cell.get("rows", []):
                words = f"{name}: {label(row)}"
                rows += [(words, row["absent"])] if "absent" in row else []
                rows += [(words, f"not timed, its loss is wrong: {row['red']}")] if "red" in row else []
        left = [name for name in self.summary["meta"].get("planned", ()) if name not in self.cells]
        return rows + [(name, "not run with this code yet: make bench goes on where it was") for name in left]


def label(row: dict) -> str:
    """A row in words: peer and step."""
    name = peer_label(row["peer"])
    return f"{name}, {row['step']}" if row.get("step") else name


def largest_peak(cell: dict) -> int:
    """The memory that a run needs: the larger of what its first steps took, compiling included, and later ones."""
    return max(cell["first_peak"], cell["steady_peak"])


def peer_label(name: str) -> str:
    """A peer's label; what is no peer, as a path of ours or a setting of the prefix cache, keeps its name."""
    return PEERS[name].label if name in PEERS else name


def _parsed(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
