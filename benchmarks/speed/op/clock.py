"""The GPU's clock: CUDA events, launches queued ahead, inputs that the cache has forgotten, peers interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

# the queue of a stream holds about a thousand launches: more would wait for the GPU and be timed with it
_QUEUED_SECONDS = 0.004
_MAX_REPEATS = 8
# a GPU's clock is below this, so that the pause is at least as long as asked for
_CYCLES_PER_SECOND = 2.2e9
_MAX_PAUSE = 0.1
_MAX_SETS = 64


@dataclass
class Timed:
    """Milliseconds per step, one value per round: on the device, and on the host until all was launched."""

    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


def input_sets(bytes_of_one: int, device: str) -> int:
    """How many sets of inputs make up twice the L2 cache, so that none is found there again; at least 2."""
    if device != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
    return min(_MAX_SETS, max(2, -(-2 * cache // max(1, bytes_of_one)) + 1))


def milliseconds_in_turns(
    runs: Mapping[str, Callable[[int], object]],
    rounds: int,
    seconds: float,
    device: str,
    now: Callable[[str], object] = lambda name: None,
) -> dict[str, Timed]:
    """Every run in every round, in an order that turns by one; at least 3 rounds, then until the seconds are over.

    runs: name -> run(i), one step on input set number i. They must have run once already: nothing is warmed up here
    but the clock. now: told who runs next.
    """
    names, timed, started = list(runs), {name: Timed() for name in runs}, time.perf_counter()
    sample = _on_gpu if device == "cuda" else _on_cpu
    number = 0
    for turn in range(-1, rounds):
        if turn >= 3 and time.perf_counter() - started > seconds:
            break
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            now(name)
            repeats, device_ms, host_ms = sample(runs[name], number, timed[name])
            number += repeats
            if turn >= 0:
                timed[name].device_ms.append(device_ms)
            timed[name].host_ms.append(host_ms)
    for row in timed.values():
        # the first was the warm-up, which the number of repeats is taken from
        del row.host_ms[0]
    return timed


def _on_gpu(run: Callable[[int], object], number: int, known: Timed) -> tuple[int, float, float]:
    host = min(known.host_ms, default=2.0) / 1e3
    repeats = max(1, min(_MAX_REPEATS, int(_QUEUED_SECONDS / max(host, 1e-6))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # the GPU waits while the host fills its queue: what is timed is kernels, not launching them
    pause = getattr(torch.cuda, "_sleep", None)
    if pause is not None:
        pause(int(min(_MAX_PAUSE, 1.5 * host * repeats + 2e-4) * _CYCLES_PER_SECOND))
    start.record()
    began = time.perf_counter()
    for i in range(repeats):
        run(number + i)
    launched = time.perf_counter()
    end.record()
    torch.cuda.synchronize()
    return repeats, start.elapsed_time(end) / repeats, 1e3 * (launched - began) / repeats


def _on_cpu(run: Callable[[int], object], number: int, known: Timed) -> tuple[int, float, float]:
    began = time.perf_counter()
    run(number)
    took = 1e3 * (time.perf_counter() - began)
    return 1, took, took
