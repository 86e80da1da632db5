"""What a run of 40 steps costs before, between and after its steps: a table of phases, in a first and a second process.

`python -m benchmarks.speed.step.startup --model smollm2` runs both steps of LoFiT, 20 steps each, in two processes with
one fresh cache of compiled layers. A phase's seconds are its own: what it calls that is a phase too is left out.
Processor seconds of one thread do not depend on who else uses the machine; wall seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

STEPS, BATCH = 40, 8
LEAST_SHARE = 0.8
# phase -> (module, function) whose calls are it; a class's by its name and a dot
PHASES = {
    "digest": (
        ("lofit_fast.models.gguf", "digest_of"),
        ("lofit_fast.training.base_of_run", "weights_digest"),
        ("lofit_fast.training.base_of_run", "base_digest"),
    ),
    "encode": (("lofit_fast.training.objectives", "encode_all"),),
    "patch": (("lofit_fast.training.two_steps", "patch"),),
    "settle and try": (
        ("lofit_fast.training.two_steps", "settle_for"),
        ("lofit_fast.training.objectives", "logit_rows"),
        ("lofit_fast.training.objectives", "longest_head"),
    ),
    "make trainer": (("lofit_fast.training.trainer", "LofitTrainer.__init__"),),
    "steps": (("transformers", "Trainer.train"),),
    "save": (("lofit_fast.patching.handle", "LofitHandle.save"),),
}


class Clocks:
    """Seconds of phases, each without those inside it: {phase: [processor, wall]}."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._open: list[str] = []
        self._last = _now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A scope that is a phase."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def wrapped(self, name: str, function: Callable) -> Callable:
        """The function, each call of which is a phase."""

        def timed(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def _count(self) -> None:
        now = _now()
        name = self._open[-1] if self._open else "rest"
        spent = self.seconds.setdefault(name, [0.0, 0.0])
        for i, (before, after) in enumerate(zip(self._last, now, strict=True)):
            spent[i] += after - before
        self._last = now


def _now() -> tuple[float, float]:
    """(processor seconds of this process and of those it has waited for, wall seconds)."""
    spent = os.times()
    return sum(spent[:4]), time.perf_counter()


def one_run(model: str) -> dict[str, object]:
    """A run in this process: {"seconds": {phase: [processor, wall]}, "share": of the steps, "compiled": hits, ...}."""
    clocks = Clocks()
    with clocks.phase("import"):
        import torch

        import lofit_fast as lf
        from benchmarks.speed.step.workload import task

        for places in PHASES.values():
            for module, _ in places:
                import_module(module)
    for name, places in PHASES.items():
        for module, path in places:
            *owners, attribute = path.split(".")
            owner = import_module(module)
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, attribute, clocks.wrapped(name, getattr(owner, attribute)))
    with clocks.phase("load"):
        base, tokenizer = lf.load_model(model)
    examples = task(None, STEPS * BATCH // 2).train
    recipe = lf.Recipe(top=0.1, select_epochs=1, tune_epochs=1, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder, clocks.phase("rest"):
        result = lf.fit(base, tokenizer, examples, recipe, output_dir=folder, progress=False)
    seconds = clocks.seconds
    total = [sum(spent[i] for spent in seconds.values()) for i in (0, 1)]
    steps = sum(len(row["step_losses"]) for row in result.history)
    return {
        "steps": steps,
        "seconds": seconds,
        "share": [seconds["steps"][i] / total[i] for i in (0, 1)],
        "compiled": _compiled(torch),
        "loss": [row["loss"] for row in result.history],
    }


def _compiled(torch) -> dict[str, int]:
    """How often graphs were found in torch's caches on disk, and how often they were not."""
    found = {}
    with suppress(AttributeError):
        counters = torch._dynamo.utils.counters
        for part in ("inductor", "aot_autograd"):
            found |= {name: count for name, count in counters[part].items() if "cache" in name}
    return found


def in_process(model: str, caches: str, threads: int) -> dict[str, object]:
    """`one_run` in a process of its own. caches: the folder of compiled layers."""
    command = [sys.executable, "-m", "benchmarks.speed.step.startup", "--model", model, "--one"]
    settings = {"TORCHINDUCTOR_CACHE_DIR": caches, "OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | settings)
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """Print the table of both processes, or one process's numbers. Exits with 1 below the share that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as of load_model")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--one", action="store_true", help="run in this process and print JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one_run(given.model)))
        return
    with tempfile.TemporaryDirectory() as caches:
        for number in ("first", "second"):
            run = in_process(given.model, caches, given.threads)
            print(f"{number} process: {run['steps']} steps, compiled layers {run['compiled'] or 'none'}")
            for name, (processor, wall) in run["seconds"].items():
                print(f"  {name:15s} {processor:8.2f} s of a processor {wall:8.2f} s wall")
            print(f"  in steps: {run['share'][0]:.1%} of processor seconds, {run['share'][1]:.1%} wall", flush=True)
            if run["share"][0] < LEAST_SHARE:
                sys.exit(1)


if __name__ == "__main__":
    main()
