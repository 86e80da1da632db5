"""How few examples saliency needs: the heads that it chooses by some of a task's examples, beside those by all.

    python -m benchmarks.accuracy.saliency_examples --data DIR --model smollm2,gemma3-270m

Two draws of training examples, one per seed, say how far two looks at as many examples agree anyway. Rows that are
there are kept, and a killed run goes on.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.accuracy.execute import commit
from benchmarks.accuracy.fast_cells import FastCell
from benchmarks.accuracy.method_table import TASKS
from benchmarks.accuracy.paper_cells import VALIDATION
from benchmarks.accuracy.tables import markdown
from benchmarks.accuracy.task_parts import TaskData, survey
from lofit_fast.cli.command import command
from lofit_fast.files import write_json
from lofit_fast.heads import jaccard, scores_as_json, scores_from_json, select_heads
from lofit_fast.models.load import load_model
from lofit_fast.training.summary import environment

OUTPUT = Path("docs/results/fast/saliency_examples.json")
COUNTS, ALL, SEEDS = (64, 128), 300, (42, 43)
_HEADER = ("task", "heads", "examples", "heads in common", "of the score", "heads in common, other draw")


def saliency_examples(
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Folder of the tasks' published splits.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Comma between.")] = "smollm2,gemma3-270m",
    task: Annotated[str, typer.Option("--task", "-t", help="Comma between.")] = "mquake,clutrr,truthfulqa",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file of the scores.")] = OUTPUT,
) -> None:
    """Score heads by saliency with each number of examples, and print how far the choices agree."""
    tasks = tuple(task.split(","))
    sizes = {name: min(count, ALL) for name, count in survey(tasks, data).train.items()}
    rows = json.loads(output.read_text())["rows"] if output.is_file() else []
    there = {(row["model"], row["task"], row["seed"], row["examples"]) for row in rows}
    for name in model.split(","):
        wanted = [(t, seed, n) for t in tasks for seed in SEEDS for n in counts_of(sizes[t])]
        missing = [key for key in wanted if (name, *key) not in there]
        if not missing:
            continue
        base, tokenizer = load_model(name, dtype=dtype)
        parts = TaskData(data, tokenizer)
        for t, seed, n in missing:
            part = parts.part(t, train_size=sizes[t], n_judged=1, seed=seed, split=VALIDATION)
            with tempfile.TemporaryDirectory() as folder:
                row, seconds = _scored(base, tokenizer, part, FastCell(name, t, "full", seed, sizes[t], 1), n, folder)
            rows.append({**row, "environment": environment(base), **commit()})
            write_json(output, {"rows": rows})
            print(f"{name}, {t}, seed {seed}, {n} examples: {seconds:.0f} s", file=sys.stderr)
    print(examples_table(rows))


def counts_of(size: int) -> list[int]:
    """The numbers of examples to look at, of so many."""
    return [*(count for count in COUNTS if count < size), size]


def examples_table(rows: list[dict]) -> str:
    """What each number of examples shares with all of them, mean over seeds; see the page's words above it."""
    found = {(row["model"], row["task"], row["examples"], row["seed"]): row for row in rows}
    lines = []
    for name, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        numbers = sorted({n for m, t, n, _ in found if (m, t) == (name, task)})
        for n in numbers:
            pairs = [(found.get((name, task, n, s)), found.get((name, task, numbers[-1], s))) for s in SEEDS]
            pairs = [(some, whole) for some, whole in pairs if some and whole]
            if not pairs:
                continue
            cross = [found.get((name, task, numbers[-1], SEEDS[1 - SEEDS.index(some["seed"])])) for some, _ in pairs]
            others = [_shared(some, other) for (some, _), other in zip(pairs, cross, strict=True) if other]
            lines.append(
                [
                    f"{TASKS[task].label}, {name}",
                    str(len(_heads(pairs[0][0]))),
                    str(n),
                    f"{statistics.fmean(_shared(*pair) for pair in pairs):.2f}",
                    f"{100 * statistics.fmean(_kept(*pair) for pair in pairs):.1f} %",
                    f"{statistics.fmean(others):.2f}" if others else "",
                ]
            )
    return markdown(_HEADER, lines)


def _scored(model, tokenizer, task, cell: FastCell, n: int, folder: str) -> tuple[dict, float]:
    from lofit_fast.selection.methods import saliency

    recipe = replace(cell.recipe(), select="saliency", select_examples=n)
    chosen = saliency(model, tokenizer, task, recipe, output_dir=folder, seed=cell.seed)
    named = {"model": cell.model, "task": cell.task, "seed": cell.seed, "examples": n, "top": recipe.top}
    scores = torch.tensor([[float(f"{s:.6g}") for s in r] for r in chosen.scores], dtype=torch.float64)
    return {**named, "scores": scores_as_json(scores)}, chosen.seconds


def _heads(row: dict) -> list[tuple[int, int]]:
    return select_heads(scores_from_json(row["scores"]), row["top"])


def _shared(some: dict, whole: dict) -> float:
    return jaccard(_heads(some), _heads(whole))


def _kept(some: dict, whole: dict) -> float:
    """Of the score that the best heads have together, by all examples, what those chosen by some of them have."""
    scores = scores_from_json(whole["scores"])
    best, chosen = (sum(scores[layer, head] for layer, head in _heads(row)) for row in (whole, some))
    return float(chosen / best)


app = typer.Typer(pretty_exceptions_enable=False)
command(app, "--data DIR", program="python -m benchmarks.accuracy.saliency_examples", goes_on=True)(saliency_examples)

if __name__ == "__main__":
    app()
