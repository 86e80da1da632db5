"""What a finished run leaves to read: summary.json, heads.png, loss.png."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from lofit_fast.config import Recipe
from lofit_fast.extras import can_draw
from lofit_fast.files import as_json, given_path, write_json
from lofit_fast.patching.placement import device_of, dtype_of
from lofit_fast.patching.seal import tensors_digest
from lofit_fast.plots import heads_map, loss_curves
from lofit_fast.training.two_steps import FitResult


def write_summary(
    folder: Path | str, result: FitResult, *, model: str, task: str, recipe: Recipe, data_seed: int, **more: object
) -> dict[str, object]:
    """Write the summary and, where matplotlib is installed, the plots into a run folder; returns the summary.

    It is as `as_json` has it. data_seed: of the draw that set the evaluation data aside. more: further keys of the
    summary. "adapter_digest" in it is the SHA-256 of the adapter's tensors, as in adapter_config.json: two runs of one
    digest have the same adapter.
    """
    folder = given_path(folder)
    found = {
        "model": model,
        "task": task,
        **{
            f"accuracy_after_{stage}": values["exact_match"]
            for stage, values in result.metrics.items()
            if "exact_match" in values
        },
        "trainable_parameters": result.handle.n_parameters(),
        "adapter_digest": tensors_digest(result.handle.vectors()),
        "seconds": sum(values["seconds"] for values in result.metrics.values()),
        **{key: result.metrics["tune"].get(key) for key in ("tokens_per_s", "examples_per_s", "peak_memory_bytes")},
        "n_heads": len(result.heads),
        "heads": [list(pair) for pair in result.heads],
        **more,
        "recipe": asdict(recipe),
        "data_seed": data_seed,
        "environment": environment(result.handle.model),
    }
    if can_draw():
        title = f"{model}, {task}"
        if result.scores is not None:
            heads_map(result.scores, result.heads, folder / "heads.png", title, recipe.select)
        if any("loss" in row for row in result.history):
            loss_curves(result.history, folder / "loss.png", title)
    summary = as_json(found)
    # last: a sweep takes a run with a summary for one that has left everything
    write_json(folder / "summary.json", summary)
    return summary


def short_digest(summary: Mapping[str, object]) -> str:
    """The digest of a summary's adapter, short enough to compare by eye."""
    return str(summary["adapter_digest"])[:12]


def environment(model: torch.nn.Module) -> dict[str, str]:
    """Where and with what a number was made."""
    from lofit_fast import __version__

    device = device_of(model)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "lofit_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
