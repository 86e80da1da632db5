"""docs/results/fast.md: what each fast setting costs in accuracy, from the cells that are there."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.bootstrap import paired_bootstrap
from benchmarks.accuracy.fast_cells import FULL, SETTINGS, FastCell, FastSlot, compared
from benchmarks.accuracy.method_table import TASKS
from benchmarks.accuracy.paper_cells import CellFolder
from benchmarks.accuracy.saliency_examples import OUTPUT as EXAMPLES
from benchmarks.accuracy.saliency_examples import examples_table
from benchmarks.accuracy.tables import markdown, percent
from lofit_fast.files import write_text
from lofit_fast.heads import jaccard

_HEADER = (
    "setting",
    "seeds",
    "accuracy, %",
    "difference, points",
    "95 % interval",
    "heads in common",
    "tokens of step 1",
    "tokens of both steps",
)

Found = dict[str, dict[int, dict]]


def write_page(path: Path, folder: CellFolder, slots: list[FastSlot], command: str) -> Path:
    """Write the page of the finished cells; returns its path."""
    tables: dict[tuple[str, str], Found] = defaultdict(lambda: defaultdict(dict))
    sizes: dict[tuple[str, str], FastCell] = {}
    for cell, result in compared(folder, slots):
        tables[cell.model, cell.task][cell.setting][cell.seed] = result
        sizes[cell.model, cell.task] = cell
    parts = [_head(folder, path, command)]
    parts += [_table(tables[key], sizes[key]) for key in tables] or ["No cell is finished yet.\n"]
    parts += _examples(folder.path.parent / EXAMPLES.name)
    write_text(path, "\n".join(parts))
    return path


def _head(folder: CellFolder, path: Path, command: str) -> str:
    cells = folder.path.relative_to(path.parent)
    return f"""# What fast runs cost in accuracy

Made by `{command}`; every number comes from a JSON file under `{cells}/`.

A *setting* is the full run with what its name says changed: examples, questions, seed and the rest of the recipe are
the same. Where it says several things, what each of them brings is not told apart here. The full run has the best of
four settings, a shorter search than that of docs/results/paper; each table says which.

The difference is the setting's accuracy minus the full run's, in points. Its
interval resamples questions and seeds, both at once, in pairs: the same question and seed of either run. An interval
that holds 0 does not show that the two are equal; its ends say how far apart they may be. *Heads in common* is the
Jaccard overlap with the full run's heads of the same seed, mean over seeds. Tokens are those of the examples that
training went through, counted: time is no evidence here, since the processor was shared. With answers' tokens alone the
prompts among them went through the model once, forward only.

Answers' tokens alone on 30 % of the heads, in 5 epochs, is what `--fast --positions answer` does. All but the epochs
was chosen among seven settings by SmolLM2's answers to these questions of MQuAKE with seed 42, and 5 epochs rather than
10 by SmolLM2's three seeds. So SmolLM2's tables flatter it; the other model had no part in the choice. The preset looks
at 128 examples to choose heads, these runs at 64 of their 96.
"""


def _table(found: Found, cell: FastCell) -> str:
    full = found.get(FULL, {})
    rows = [_row(SETTINGS[name].label, found[name], full, name) for name in SETTINGS if found.get(name)]
    title = f"## {TASKS[cell.task].label}, {cell.model}\n\n{cell.train_size} training examples, "
    made = _made_on(result for runs in found.values() for result in runs.values())
    recipe = replace(cell, setting=FULL, options=()).recipe()
    rates = f"rates {recipe.select_lr:g} and {recipe.tune_lr:g}, {100 * recipe.top:g} % of the heads"
    text = f"{title}n = {cell.n_validation} questions, {_metric(found)}. The full run has the {rates}. Made on: {made}."
    return f"{text}\n\n{markdown(_HEADER, rows)}"


def _examples(path: Path) -> list[str]:
    """The section on how few examples saliency needs; nothing where that was not measured."""
    if not path.is_file():
        return []
    rows = json.loads(path.read_text())["rows"]
    return [
        f"""## How few examples saliency needs

Made by `python -m benchmarks.accuracy.saliency_examples --data DIR`, on: {_made_on(rows)}; every score is in
`{path.parent.name}/{path.name}`.

Heads chosen by some of the examples beside those chosen by all, mean over two draws of examples. *Heads in common* is
the Jaccard overlap of the two choices; *of the score* says how much of the summed score of the best heads, by all
examples, the heads chosen by some have; *other draw* is the overlap with the choice by all examples of the other seed,
so the last row of a task says how far two looks at all examples agree.

{examples_table(rows)}"""
    ]


def _made_on(results: Iterable[dict]) -> str:
    return "; ".join(sorted({f"{one['environment']['device']}, {one['environment']['dtype']}" for one in results}))


def _metric(found: Found) -> str:
    metrics = next(iter(next(iter(found.values())).values()))["metrics"]
    return "exact match" if "exact_match" in metrics else "MC1"


def _row(label: str, runs: dict[int, dict], full: dict[int, dict], name: str) -> list[str]:
    accuracies = {seed: statistics.fmean(result["hits"]) for seed, result in runs.items()}
    both = sorted(runs.keys() & full.keys())
    difference, interval, shared = "", "", ""
    if both and name != FULL:
        pairs = [[run[seed]["hits"] for seed in both] for run in (runs, full)]
        mean = statistics.fmean(accuracies[s] - statistics.fmean(full[s]["hits"]) for s in both)
        found = paired_bootstrap(*pairs)
        # thirds of hits must not fall below 0 by rounding
        difference, interval = (
            f"{round(100 * mean, 9) + 0.0:+.1f}",
            f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
        )
        shared = f"{statistics.fmean(_overlap(runs[s], full[s]) for s in both):.2f}"
    step1 = statistics.fmean(result["tokens"]["select"] for result in runs.values())
    total = statistics.fmean(sum(result["tokens"].values()) for result in runs.values())
    seeds, accuracy = ", ".join(map(str, sorted(runs))), percent(list(accuracies.values()))
    return [
        label,
        seeds,
        accuracy,
        difference,
        interval,
        shared,
        f"{step1:,.0f}",
        f"{total:,.0f}",
    ]


def _overlap(one: dict, other: dict) -> float:
    return jaccard(*([tuple(pair) for pair in result["heads"]] for result in (one, other)))
