"""A step through the first decoder layers, compiled: products in full and in int8, in turns. CPU clock of one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.step.quantized_steps [--model smollm2] [--layers 3] [--step 2]

Time is that of the thread, so that other work on the machine counts little. The embeddings' and the head's share of a
step is left out, which no product in 8 bits changes. Prints the medians, their ratio, and the operators that take most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lofit_fast as lf
from lofit_fast.models.load import load_model
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.training.engine import Engine, prepared

BATCH, LENGTH, PER_ROUND = 8, 96, 2
ENGINES = {name: Engine(attention="sdpa", compile=True, frozen_products=name) for name in ("full", "int8")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--step", type=int, choices=(1, 2), default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load_model(options.model, dtype="float32")
    run = step_of(model, options.layers, options.step)
    seconds = {name: [] for name in ENGINES}
    for _ in range(options.rounds):
        for name, engine in ENGINES.items():
            with prepared(model, engine):
                run()
                seconds[name] += [_timed(run) for _ in range(PER_ROUND)]
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    ratios = [full / int8 for full, int8 in zip(*seconds.values(), strict=True)]
    print(f"step {options.step}: {medians}, ratio {medians['full'] / medians['int8']:.2f}, of pairs {sorted(ratios)}")
    for name, engine in ENGINES.items():
        with prepared(model, engine):
            run()
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                run()
        print(name, profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=16), sep="\n")


def step_of(model: nn.Module, layers: int, step: int) -> Callable[[], None]:
    """Patch the model's first layers and return a forward and backward pass through them."""
    decoder = model.get_decoder()
    decoder.layers = nn.ModuleList(decoder_layers(model)[:layers])
    tuned = [(number, head) for number in range(layers) for head in (0, 4)]
    config = lf.LofitConfig(scale="all") if step == 1 else lf.LofitConfig(offset=tuned)
    parameters = list(lf.patch(model, config).parameters())
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        torch.autograd.grad(states.square().sum(), parameters)

    return run


def _timed(run: Callable[[], None]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


if __name__ == "__main__":
    main()
