"""Two processes against one on this machine's cores: examples per second of both steps, the same global batch.

    python -m benchmarks.speed.step.two_processes [--quick] [--model smollm2] [--json FILE]

One process with all cores, and two of one launch with half of them each, take turns: each trains a few epochs of the
same examples while the others wait. The first round warms up and does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import IO, Any

RESULT = Path("docs/results/distributed/two_processes.json")
STAGES = {"select": "step 1, scales on every head", "tune": "step 2, offsets on a tenth of the heads"}
# examples of a round, examples of a step, rounds that count
_FULL, _QUICK = (48, 16, 5), (16, 8, 2)


def train(model: Any, tokenizer: Any, examples: list, batch_size: int) -> dict[str, float]:
    """Examples per second of each stage of a run, in every process of the launch."""
    from lofit_fast import ranks
    from lofit_fast.config import Recipe
    from lofit_fast.training.engine import Engine
    from lofit_fast.training.fit import fit

    recipe = Recipe(select_epochs=1, tune_epochs=1, batch_size=batch_size, top=0.1)
    with tempfile.TemporaryDirectory() as own:
        folder = ranks.told(lambda: own)
        how = {"output_dir": folder, "engine": Engine(compile=False), "progress": False}
        result = fit(model, tokenizer, examples, recipe, **how)
        result.handle.unpatch()
        # the first process's folder is everybody's, until all have left it
        ranks.gathered("done")
    return {stage: result.metrics[stage]["examples_per_s"] for stage in STAGES}


def work(model: str, n_examples: int, batch_size: int, threads: int) -> None:
    """A process of either kind: trains for each line of standard input, and the first prints the rates as JSON."""
    import torch

    from lofit_fast import ranks
    from lofit_fast.models.load import load_model
    from lofit_fast.tasks import load_task

    torch.set_num_threads(threads)
    # what training says goes elsewhere
    answers, sys.stdout = sys.stdout, sys.stderr
    ranks.begun()
    base, tokenizer = load_model(model, dtype="float32", device="cpu")
    examples = load_task("kinship", None, tokenizer, train_size=n_examples, seed=0, progress=False).train
    for _ in sys.stdin:
        rates = train(base, tokenizer, examples, batch_size)
        if ranks.first():
            print(json.dumps(rates), file=answers, flush=True)


@contextmanager
def started(count: int, arguments: list[str], threads: int) -> Iterator[list[subprocess.Popen]]:
    """A scope with `count` waiting processes of one launch."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    processes = []
    for rank in range(count):
        launch = {**shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        env = {**os.environ, **launch, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        line = [sys.executable, "-m", "benchmarks.speed.step.two_processes", *arguments, "--worker", str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(line, env=env, **pipes))
    try:
        yield processes
    finally:
        for process in processes:
            process.stdin.close()
        for process in processes:
            process.wait()


def a_round(processes: list[subprocess.Popen]) -> dict[str, float]:
    """Let the processes train once. Raises RuntimeError where they end instead."""
    for process in processes:
        _said(process.stdin, "go")
    if not (line := processes[0].stdout.readline()):
        raise RuntimeError(f"a training of {len(processes)} processes has ended with {processes[0].wait()}")
    return json.loads(line)


def _said(pipe: IO[str], word: str) -> None:
    pipe.write(word + "\n")
    pipe.flush()


def measured(arguments: list[str], rounds: int, cores: int) -> dict[str, Any]:
    """Rates of both kinds by stage, of rounds that alternate, and the medians of their ratios."""
    with ExitStack() as stack:
        kinds = {n: stack.enter_context(started(n, arguments, max(1, cores // n))) for n in (1, 2)}
        found: dict[int, list[dict[str, float]]] = {n: [] for n in kinds}
        for number in range(rounds + 1):
            # who goes first takes turns too
            for n in sorted(kinds, reverse=number % 2 == 1):
                rates = a_round(kinds[n])
                if number:
                    found[n].append(rates)
                print(f"round {number}: {n} process{'es' * (n > 1)} {rates}", file=sys.stderr)
    stages = {}
    for stage, name in STAGES.items():
        one, two = ([rates[stage] for rates in found[n]] for n in (1, 2))
        ratio = median(b / a for a, b in zip(one, two, strict=True))
        stages[name] = {"one": one, "two": two, "medians": [median(one), median(two)], "two_to_one": ratio}
    return stages


def main() -> None:
    """Measure, print and write the file; or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quick", action="store_true", help="few examples and two rounds: whether it runs, no result")
    parser.add_argument("--json", type=Path, help=f"default: {RESULT}, of --quick none")
    parser.add_argument("--worker", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    examples, batch_size, rounds = _QUICK if options.quick else _FULL
    if options.worker is not None:
        work(options.model, examples, batch_size, options.worker)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments = ["--model", options.model, *["--quick"] * options.quick]
    stages = measured(arguments, rounds, cores)
    for name, row in stages.items():
        one, two = row["medians"]
        print(f"{name}: {one:.2f} examples/s by one process, {two:.2f} by two, ratio {row['two_to_one']:.2f}")
    place = options.json or (None if options.quick else RESULT)
    if place is not None:
        from benchmarks.speed.timing import machine
        from lofit_fast.files import write_json

        about = {"kind": "wall clock, interleaved in one call", "model": options.model, "cores": cores}
        about |= {"examples": examples, "batch_size": batch_size, "machine": machine()}
        write_json(place, about | {"examples_per_s": stages})


if __name__ == "__main__":
    main()
