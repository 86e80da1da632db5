"""What one adapted projection costs the processor beside a GPU: the frozen projection, an eager hook, and ours.

    python -m benchmarks.proof.host_cost [--rounds 60] [--dtype bfloat16] [--json FILE]

A GPU that waits for its next kernel is as slow as the Python that launches it: with short batches or a small model that
is the step. Measured is the CPU time of one thread, forward and backward, of a stack of projections as a patched model
holds them, on tensors so small that their arithmetic costs nothing. Ours takes its Triton path; its launches are noted,
not run (`launch.recording`), so Triton's own launcher is not in the numbers, nor is CUDA's. The rows are timed in
turns; a row is the median of its rounds. `calls` counts the calls of Python functions in a round: exact, no clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.peers.hook import HookLofit
from lofit_fast.patching.fold import ModelFold
from lofit_fast.patching.layer import LofitLinear
from lofit_kernels import dispatch

LABEL = "CPU clock of the host side; launches recorded, not run; Triton's own launcher is not in it"
ARCH = "sm_90"
# as many layers as Llama-3.2-1B has
LAYERS, TOKENS, HEADS, HEAD_DIM = 16, 4, 4, 16
SIZE = HEADS * HEAD_DIM
# rounds that fill caches
WARM_UP = 5
# step -> the component, and its heads in every layer
STEPS: dict[str, tuple[str, list[int]]] = {"step 1": ("scale", list(range(HEADS))), "step 2": ("offset", [0, 2])}


class Attention(nn.Module):
    """Nothing but the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(SIZE, SIZE, bias=False)


class Layer(nn.Module):
    """Nothing but the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()


class Stack(nn.Module):
    """The output projections of a decoder, one after the other, where a decoder has them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.requires_grad_(False).to(dtype)

    @property
    def model(self) -> nn.Module:
        """Itself: a model's decoder is at `model.model`."""
        return self

    def forward(self, z: Tensor) -> Tensor:
        """z: (T, K). Returns (T, K)."""
        for layer in self.layers:
            z = layer.self_attn.o_proj(z)
        return z


def floor(step: str, dtype: torch.dtype) -> Stack:
    """The frozen projections alone."""
    return Stack(dtype)


def hook(step: str, dtype: torch.dtype) -> Stack:
    """The peer: a forward pre-hook on each projection."""
    stack, (component, heads) = Stack(dtype), STEPS[step]
    rows = torch.zeros(len(heads), HEAD_DIM)
    HookLofit(stack, {(n, component): (heads, rows) for n in range(LAYERS)})
    return stack


def ours(step: str, dtype: torch.dtype) -> Stack:
    """The projections as `lofit_fast.patch` leaves them, and the fold of all of them."""
    stack, (component, heads) = Stack(dtype), STEPS[step]
    places = {"scale": (heads, None), "offset": (None, heads)}[component]
    wrapped = []
    for layer in stack.layers:
        wrapped.append(LofitLinear(layer.self_attn.o_proj, HEADS, HEAD_DIM, *places))
        layer.self_attn.o_proj = wrapped[-1]
    ModelFold(stack, wrapped)
    return stack


ROWS: dict[str, Callable[[str, torch.dtype], Stack]] = {"floor": floor, "hook": hook, "ours": ours}


@contextmanager
def on_a_gpus_path() -> Iterator[None]:
    """A scope in which projections on a CPU take the path that they take on a GPU, with no launch run."""
    from lofit_kernels.gpu.launch import recording

    dispatch.forget_plans()
    try:
        with patch.object(dispatch, "default_backends", lambda *_: ("triton", "aten")), recording(ARCH) as recorded:
            yield recorded
    finally:
        dispatch.forget_plans()


class Round:
    """One forward and backward of a row in a step."""

    def __init__(self, row: str, step: str, dtype: torch.dtype) -> None:
        self.stack = ROWS[row](step, dtype)
        self.z = torch.randn(1, TOKENS, SIZE).to(dtype).requires_grad_()
        self.grad = torch.randn(1, TOKENS, SIZE).to(dtype)

    def __call__(self) -> None:
        """The gradients stay, as between two micro-batches."""
        self.stack(self.z).backward(self.grad)


def cases(dtype: torch.dtype) -> dict[tuple[str, str], Round]:
    """(row, step) -> its round."""
    return {(row, step): Round(row, step, dtype) for step in STEPS for row in ROWS}


@contextmanager
def no_collector() -> Iterator[None]:
    """A scope without Python's garbage collector, which would stop whichever row happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seconds(rounds: int, dtype: torch.dtype = torch.bfloat16) -> dict[tuple[str, str], float]:
    """(row, step) -> the median seconds of this thread per projection, measured in turns."""
    found: dict[tuple[str, str], list[float]] = {}
    with on_a_gpus_path() as recorded, no_collector():
        runs = cases(dtype)
        for number in range(rounds + WARM_UP):
            for case, run in runs.items():
                start = time.thread_time()
                run()
                taken = time.thread_time() - start
                # noted launches are kept, with their tensors
                recorded.launches.clear()
                if number >= WARM_UP:
                    found.setdefault(case, []).append(taken / LAYERS)
    return {case: median(times) for case, times in found.items()}


def calls(dtype: torch.dtype = torch.bfloat16) -> dict[tuple[str, str], int]:
    """(row, step) -> the calls of Python functions in one round of all layers, exactly."""
    with on_a_gpus_path():
        return {case: _counted(run) for case, run in cases(dtype).items()}


def _counted(run: Callable[[], None]) -> int:
    made = 0

    def note(frame, event: str, argument) -> None:
        nonlocal made
        made += event == "call"

    # the first ones fill caches
    run()
    run()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    # its own call, and that which ends it
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.proof.host_cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="forward and backward passes of each row")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dtype = getattr(torch, chosen.dtype)
    times, made = seconds(chosen.rounds, dtype), calls(dtype)
    print(
        f"{LABEL}\nmicroseconds per projection, forward and backward, {chosen.dtype}, {chosen.rounds} rounds in turns"
    )
    for (row, step), taken in times.items():
        print(f"  {step}  {row:6} {1e6 * taken:7.1f} us  {made[row, step] / LAYERS:7.1f} Python calls")
    if chosen.json:
        rows = [
            {"step": step, "row": row, "microseconds": 1e6 * taken, "calls": made[row, step] / LAYERS}
            for (row, step), taken in times.items()
        ]
        content = {"label": LABEL, "dtype": chosen.dtype, "rounds": chosen.rounds, "rows": rows}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
