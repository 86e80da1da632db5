"""Kernels with a fault planted on purpose, for the checkers to find, and one without."""

import torch
import triton
import triton.language as tl


@triton.jit
def _sound_kernel(x, y, n, BLOCK: tl.constexpr):
    """y = 2 x"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _reads_beyond_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)  # planted
    tl.store(y + i, value, mask=i < n)


@triton.jit
def _writes_beyond_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, value, mask=i <= n)  # planted


@triton.jit
def _two_writers_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, value + tl.program_id(0), mask=i < n)  # planted


@triton.jit
def _reads_a_neighbour_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(y + i - 1, mask=(i > 0) & (i < n), other=0.0)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) + before, mask=i < n)  # planted


@triton.jit
def _promises_kernel(x, AHEAD: tl.constexpr):
    tl.store(tl.multiple_of(x + AHEAD, 16), 2.0)  # planted


def launch(kernel, device: torch.device) -> torch.Tensor:
    """Runs a kernel over 100 elements in two programs; returns what it wrote."""
    x, y = torch.ones(100, device=device), torch.zeros(100, device=device)
    kernel[(2,)](x, y, 100, BLOCK=64)
    return y


def planted_line(kernel) -> int:
    """The number of the line with the fault."""
    function = kernel.fn
    with open(function.__code__.co_filename) as file:
        lines = list(enumerate(file, 1))
    return next(n for n, text in lines if "# planted" in text and n > function.__code__.co_firstlineno)
