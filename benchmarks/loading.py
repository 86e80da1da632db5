"""The models of the benchmark, and how a cell gets them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from benchmarks.workload import EXAMPLES, Workload, workload
from lofit_fast.models import load_model

# the heading of a model in tables and in summary.json, and the name it is loaded by
MODELS = {"SmolLM2-135M": "smollm2", "Gemma-3-270M": "gemma3-270m"}


def loaded(
    heading: str, data: Path | str | None, dtype: str = "auto", size: int = EXAMPLES
) -> tuple[nn.Module, object, Workload]:
    """(model, tokenizer, workload of `size` examples); the dtype is the machine's best unless given."""
    model, tokenizer = load_model(MODELS[heading], dtype=dtype)
    return model, tokenizer, workload(tokenizer, data, size)
