"""How everything here is timed: interleaved rounds, medians, ratios with an interval, and what machine it was."""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

K, T = TypeVar("K"), TypeVar("T")
ROUNDS = 7
# the fewest rounds with an interval: the smallest and the largest of five hold the median in 94 % of cases
FOR_INTERVAL = 6
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """The median over paired rounds of numerator / denominator, and a bracket around it.

    low, high: the 95 % bootstrap interval from FOR_INTERVAL rounds on; of fewer rounds the smallest and the largest.
    """

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} {bracket(self.low, self.high, self.rounds)}"


def bracket(low: float, high: float, rounds: int) -> str:
    """A ratio's bracket in words, which say where it is no interval."""
    of = f", range of {rounds}" if rounds < FOR_INTERVAL else ""
    return f"({low:.2f} to {high:.2f}{of})"


def interleaved(
    peers: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every peer in every round, which `in_turns` orders.

    warmup: rounds thrown away first. device: "cuda" waits for the GPU around each call.
    Raises ValueError for fewer than one round.
    """
    clocked = {name: lambda number, run=run: seconds_of(run, device) for name, run in peers.items()}
    return in_turns(clocked, rounds=rounds, warmup=warmup)


def in_turns(calls: Mapping[K, Callable[[int], T]], *, rounds: int, warmup: int = 0) -> dict[K, list[T]]:
    """What every call returned of every round: each round makes all of them once, in an order that turns by one.

    A call gets the number of the round, from 1. warmup: rounds before those, up to number 0, whose returns are thrown
    away.
    Raises ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"expected at least 1 round, got {rounds}")
    names = list(calls)
    returned: dict[K, list[T]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            one = calls[name](turn - warmup + 1)
            if turn >= warmup:
                returned[name].append(one)
    return returned


def seconds_of(run: Callable[[], object], device: str) -> float:
    """How long a call takes. device: "cuda" waits for the GPU before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """How many times longer the numerator took, from rounds that ran side by side.

    The interval is the percentile bootstrap of the median over pairs, see `Ratio`. Raises ValueError unless both have
    the same number of rounds, at least one.
    """
    if not numerator or len(numerator) != len(denominator):
        raise ValueError(f"expected rounds in pairs, got {len(numerator)} and {len(denominator)}")
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    if len(pairs) < FOR_INTERVAL:
        return Ratio(statistics.median(pairs), min(pairs), max(pairs), len(pairs))
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]
    return Ratio(statistics.median(pairs), low, high, len(pairs))


def machine() -> dict[str, object]:
    """Where and with what a number was made: device, processor, threads, versions, commit and whether it was clean."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "peft")},
        "python": platform.python_version(),
        **commit(),
    }


def commit() -> dict[str, object]:
    """The checkout's commit, and whether tracked files differed from it; None and None outside a checkout.

    Results are tracked too, and written while measuring: they do not count.
    """
    here = Path(__file__).parent
    head = _git(here, "rev-parse", "HEAD")
    changed = _git(here, "status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)benchmarks/results")
    return {"commit": head, "dirty": None if head is None else bool(changed)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
