"""What two processes that train together send in a step: LoFiT's vectors, beside full fine-tuning's weights.

    python -m benchmarks.proof.distributed_bytes [--model smollm2] [--processes 2] [--json FILE]

Exact counts of what each process hands to torch's collectives, of whatever library calls them: the same on every
machine. A ring sends up to twice as much over each wire.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from benchmarks.proof.reliability.trial_journal import commit
from benchmarks.speed.timing import machine
from lofit_fast import ranks
from lofit_fast.config import Recipe
from lofit_fast.data.encode import encode_prompt
from lofit_fast.files import write_json
from lofit_fast.models.load import load_model
from lofit_fast.tasks import load_task
from lofit_fast.training.engine import Engine
from lofit_fast.training.fit import fit

RESULT = Path("docs/results/distributed/bytes_per_step.json")
# the namespaces of torch's collectives: those that write into tensors, and those that return new ones
_COLLECTIVES = ("c10d", "_c10d_functional")
# steps of an epoch, and examples of a step
_STEPS, _BATCH = 3, 8


class Sent(TorchDispatchMode):
    """A scope that counts what this process hands to collectives. calls: (operation, bytes) each, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in _COLLECTIVES:
            self.calls.append((func._schema.name.rpartition("::")[2].strip("_"), _handed(args)))
        return func(*args, **(kwargs or {}))

    @property
    def bytes(self) -> int:
        """Of all calls."""
        return sum(size for _, size in self.calls)


def _handed(args: tuple[Any, ...]) -> int:
    """Bytes of the tensors that an operation is given: of (results, inputs) the inputs."""
    found = [tensors for tensors in map(_tensors, args) if tensors]
    return sum(x.nbytes for x in (found[1] if len(found) > 1 else found[0])) if found else 0


def _tensors(arg: object) -> list[Tensor]:
    if isinstance(arg, Tensor):
        return [arg]
    return [x for part in arg for x in _tensors(part)] if isinstance(arg, list | tuple) else []


class SentPerStep(TrainerCallback):
    """Counts each optimizer step of a training by itself: what is sent between two steps is another matter.

    steps: of each step its calls. trained: numbers that are trained, of each step.
    """

    def __init__(self) -> None:
        self.steps: list[list[tuple[str, int]]] = []
        self.trained: list[int] = []
        self._mode: Sent | None = None

    def on_step_begin(self, args, state, control, model=None, **_):
        """Begin to count."""
        self.trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        self._mode = Sent()
        self._mode.__enter__()

    def on_step_end(self, args, state, control, **_):
        """Keep the count."""
        self._mode.__exit__(None, None, None)
        self.steps.append(self._mode.calls)


def lofit_steps(model: nn.Module, tokenizer, examples, recipe: Recipe) -> list[dict[str, int]]:
    """Of each optimizer step of both of LoFiT's: its calls of collectives, their bytes, and the numbers trained."""
    count = SentPerStep()
    with tempfile.TemporaryDirectory() as own:
        # the folder of the first process is everybody's
        folder = ranks.told(lambda: own)
        how = {"engine": Engine(compile=False), "callbacks": [count], "progress": False}
        fit(model, tokenizer, examples, recipe, output_dir=folder, **how).handle.unpatch()
        # nobody's folder goes before all have left it
        ranks.gathered("done")
    return [
        {"calls": len(calls), "bytes": sum(size for _, size in calls), "trained": trained}
        for calls, trained in zip(count.steps, count.trained, strict=True)
    ]


def full_step(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """The same of a step of full fine-tuning, by torch's DistributedDataParallel. ids: (1, T) of this process."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trained = nn.parallel.DistributedDataParallel(model)
    with Sent() as sent:
        trained(input_ids=ids, labels=ids).loss.backward()
    model.requires_grad_(False).eval().zero_grad()
    return {"calls": len(sent.calls), "bytes": sent.bytes, "trained": sum(p.numel() for p in model.parameters())}


def measured(name: str) -> dict[str, Any]:
    """All counts, in every process of the group."""
    model, tokenizer = load_model(name, dtype="float32", device="cpu")
    examples = load_task("kinship", None, tokenizer, train_size=_STEPS * _BATCH, seed=0, progress=False).train
    recipe = Recipe(select_epochs=1, tune_epochs=1, batch_size=_BATCH, top=0.1)
    steps = lofit_steps(model, tokenizer, examples, recipe)
    ids = torch.tensor([encode_prompt(tokenizer, examples[0].prompt)])
    return {
        "LoFiT, step 1: a scale vector on every head": _of(steps[:_STEPS]),
        "LoFiT, step 2: an offset vector on a tenth of the heads": _of(steps[_STEPS:]),
        "full fine-tuning, DistributedDataParallel": _of([full_step(model, ids)]),
    }


def _of(steps: list[dict[str, int]]) -> dict[str, int]:
    """The step of a kind that sends most."""
    return max(steps, key=lambda step: step["bytes"])


def _show(found: Mapping[str, Mapping[str, int]], processes: int) -> None:
    print(f"bytes that each of {processes} processes hands to collectives per optimizer step, in float32")
    full = max(row["bytes"] for row in found.values())
    for name, row in found.items():
        share = full / row["bytes"]
        print(
            f"{name:58} {row['trained']:>12,} trained {row['bytes']:>12,} bytes in {row['calls']} calls, 1/{share:,.0f}"
        )


def main() -> None:
    """Start the processes; in one of them, count, and write what the first has found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    ranks.begun()
    if ranks.count() == 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
        sys.exit(
            subprocess.call([sys.executable, *launcher, "-m", "benchmarks.proof.distributed_bytes", *sys.argv[1:]])
        )
    found = measured(options.model)
    if ranks.first():
        about = {"kind": "exact counts, no clock", "model": options.model, "processes": dist.get_world_size()}
        write_json(options.json, about | {"commit": commit(), "machine": machine(), "per_step": found})
        _show(found, dist.get_world_size())


if __name__ == "__main__":
    main()
