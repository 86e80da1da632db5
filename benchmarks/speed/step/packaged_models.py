"""The models of the benchmark, and how a cell gets them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from benchmarks.peers.peer import Absent
from benchmarks.speed.step.workload import EXAMPLES, Workload, workload
from lofit_fast.models.load import load_model, resolve

# the heading of a model in tables and in summary.json, and the name it is loaded by
MODELS = {"SmolLM2-135M": "smollm2", "Gemma-3-270M": "gemma3-270m"}


def loaded(
    heading: str, data: Path | str | None, dtype: str = "auto", size: int = EXAMPLES
) -> tuple[nn.Module, object, Workload]:
    """(model, tokenizer, workload of `size` examples); the dtype is the machine's best unless given.

    Raises Absent, saying how to install it, for a model whose package is not there.
    """
    model, tokenizer = load_model(model_folder(heading), dtype=dtype)
    return model, tokenizer, workload(tokenizer, data, size)


def model_alone(heading: str) -> nn.Module:
    """The model that `loaded` returns, for a process that is sent its workload."""
    return load_model(model_folder(heading))[0]


def alone_with_tokenizer(heading: str) -> tuple[nn.Module, object]:
    """The model and the tokenizer that `loaded` returns, as `model_alone`."""
    return load_model(model_folder(heading))


def model_folder(heading: str) -> str:
    """Where the model is, converted. Raises Absent, saying how to install it, if its package is not there."""
    try:
        return resolve(MODELS[heading])
    except FileNotFoundError as reason:
        raise Absent(str(reason)) from reason
