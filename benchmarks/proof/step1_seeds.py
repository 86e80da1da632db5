"""Does bfloat16's dead zone change which heads step 1 chooses? A real model, several seeds, with controls.

    python -m benchmarks.proof.step1_seeds --data DIR [--seeds 3] [--json FILE]

Per seed, step 1 is trained from one initialisation by one plain loop: in float32, in bfloat16 with an eager hook (whose
forward pass ignores |a| < 2^-9), and in bfloat16 with the delta form (which does not). Read beside two controls, the
same run in another batch order: a difference below theirs is no difference. A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import lofit_fast as lf
from benchmarks.peers.hook import HookLofit, HookStep, train_hook, vectors_of
from benchmarks.speed.timing import machine
from lofit_fast.config import RECIPES
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import encode, pad_token_id
from lofit_fast.files import write_json
from lofit_fast.heads import jaccard
from lofit_fast.models.load import load_model
from lofit_fast.tasks import load_task

MODEL, TASK, EXAMPLES, BATCH_SIZE, EPOCHS, TOP = "smollm2", "clutrr", 128, 4, 4, 0.1


@dataclass(frozen=True)
class Variant:
    """One way to train step 1. order: which shuffling of the batches."""

    dtype: str
    adapter: str
    order: int


VARIANTS = {
    "float32": Variant("float32", "hook", 0),
    "float32, other order": Variant("float32", "hook", 1),
    "bfloat16 hook": Variant("bfloat16", "hook", 0),
    "bfloat16 hook, other order": Variant("bfloat16", "hook", 1),
    "bfloat16 delta": Variant("bfloat16", "delta", 0),
}
# what is compared with what, and what it tells
COMPARISONS = {
    "bfloat16 hook against float32": ("bfloat16 hook", "float32"),
    "bfloat16 delta against float32": ("bfloat16 delta", "float32"),
    "bfloat16 delta against bfloat16 hook": ("bfloat16 delta", "bfloat16 hook"),
    "control: float32 against float32 in another order": ("float32, other order", "float32"),
    "control: bfloat16 hook against itself in another order": ("bfloat16 hook, other order", "bfloat16 hook"),
}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the CLUTRR splits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("docs/results/step1_seeds.json"))
    options = parser.parse_args()
    runs = json.loads(options.json.read_text())["runs"] if options.json.is_file() else []
    done = {(run["seed"], run["variant"]) for run in runs}
    # one model after the other, since two do not share a dtype
    for dtype in ("bfloat16", "float32"):
        missing = [
            (seed, name)
            for seed in range(options.seeds)
            for name, variant in VARIANTS.items()
            if variant.dtype == dtype and (seed, name) not in done
        ]
        for run in _train_all(missing, dtype, options.data):
            runs.append(run)
            write_json(options.json, {"setting": _setting(), "machine": machine(), "runs": runs})
    print(table(runs))


def table(runs: list[dict]) -> str:
    """Markdown: the Jaccard overlap of the chosen heads per comparison and seed, with the mean."""
    heads = {(run["seed"], run["variant"]): [tuple(pair) for pair in run["heads"]] for run in runs}
    seeds = sorted({seed for seed, _ in heads})
    lines = ["| | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |", "|---" * (len(seeds) + 2) + "|"]
    for label, (first, second) in COMPARISONS.items():
        overlaps = [jaccard(heads[s, first], heads[s, second]) for s in seeds]
        cells = [f"{value:.2f}" for value in (*overlaps, statistics.mean(overlaps))]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _train_all(missing: list[tuple[int, str]], dtype: str, data: str) -> Iterator[dict]:
    if not missing:
        return
    model, tokenizer = load_model(MODEL, dtype=dtype, device="cpu")
    model.set_attn_implementation("eager")
    task = load_task(TASK, data, tokenizer)
    examples = [encode(tokenizer, example, None) for example in task.train[:EXAMPLES]]
    for seed, name in missing:
        started = time.perf_counter()
        batches = _batches(examples, pad_token_id(tokenizer), seed, VARIANTS[name].order)
        scores, losses = _step_1(model, VARIANTS[name].adapter, batches, seed)
        heads = lf.select_heads(scores, TOP)
        yield {
            "seed": seed,
            "variant": name,
            "heads": heads,
            "scores": [[round(value, 6) for value in row] for row in scores.tolist()],
            "losses": [round(loss, 5) for loss in losses],
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(f"seed {seed}, {name}: losses {losses}", flush=True)


def _step_1(model: nn.Module, adapter: str, batches: list[list[dict]], seed: int) -> tuple[torch.Tensor, list[float]]:
    """(layers, heads) scale norms after step 1, and the loss per epoch; the model comes back as it was."""
    recipe = RECIPES[TASK]
    step = HookStep(lr=recipe["select_lr"], l1=recipe["l1"])
    handle = lf.patch(model, lf.LofitConfig(scale="all", seed=seed))
    try:
        if adapter == "delta":
            for layer in handle.layers.values():
                layer.form = "delta"
            parameters = {(number, "scale"): layer.scale for number, layer in handle.layers.items()}
            losses = train_hook(model, SimpleNamespace(parameters=parameters), batches, step)
        else:
            with handle.disabled():
                hook = HookLofit(model, vectors_of(handle))
                losses = train_hook(model, hook, batches, step)
            hook.remove()
            for (number, _), rows in hook.parameters.items():
                handle.layers[number].scale.data.copy_(rows)
        return lf.head_scores(handle), losses
    finally:
        handle.unpatch()


def _batches(examples: list, pad: int, seed: int, order: int) -> list[list[dict]]:
    draw = torch.Generator().manual_seed(1000 * seed + order)
    collate = CompletionCollator(pad)
    epochs = [torch.randperm(len(examples), generator=draw).split(BATCH_SIZE) for _ in range(EPOCHS)]
    return [[collate([examples[i] for i in rows]) for rows in epoch] for epoch in epochs]


def _setting() -> dict:
    return {
        "model": MODEL,
        "task": TASK,
        "examples": EXAMPLES,
        "batch_size": BATCH_SIZE,
        "epochs": EPOCHS,
        "top": TOP,
        "attention": "eager",
        **RECIPES[TASK],
    }


if __name__ == "__main__":
    main()
