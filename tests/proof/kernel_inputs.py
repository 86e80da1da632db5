"""What the kill cases are made of: a case, tensors with poisoned borders, and lists of heads."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tests.proof.watch import Watch

# Linux has it, the mmap module of Python 3.11 does not name it
MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class Case:
    """One call of a launcher with everything asserted about it; raises when something is wrong."""

    name: str
    call: Callable[[Watch], None]

    def run(self) -> None:
        """Runs it under the memory checker."""
        with Watch() as watch:
            self.call(watch)


def case(cases: list[Case], name: str, *args: object, **options: object) -> Callable[..., Callable[..., None]]:
    """Decorator: adds the function, called with a Watch and these arguments, to `cases`."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        cases.append(Case(name, lambda watch: function(watch, *args, **options)))
        return function

    return add


def rows(T: int, K: int, dtype: torch.dtype, extra: int = 0, seed: int = 0) -> torch.Tensor:
    """Random (T, K), rows `extra` elements apart; the gaps, and a border on both sides, are NaN."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.full((T + 2, K + extra), float("nan"), dtype=dtype)
    room[1:-1, :K] = torch.randn(T, K, generator=generator, dtype=torch.float64).to(dtype)
    return room[1:-1, :K] if extra else room[1:-1]


def vector(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random (n,) between NaNs."""
    return rows(1, n, dtype, seed=seed)[0]


def heads(*listed: int) -> torch.Tensor:
    """(n,) int64, between numbers that are no heads."""
    return torch.tensor([-9, *listed, -9], dtype=torch.int64)[1:-1]


def values(n: int, D: int, seed: int = 1, size: float = 1.0) -> torch.Tensor:
    """Random float32 (n, D) between NaNs."""
    return rows(n, D, torch.float32, seed=seed).mul_(size)


def columns(listed: torch.Tensor, D: int) -> torch.Tensor:
    """The columns of these heads."""
    return (listed[:, None] * D + torch.arange(D)).reshape(-1)


def unlisted(H: int, *lists: torch.Tensor) -> torch.Tensor:
    """The heads that are in none of the lists."""
    taken = {head for listed in lists for head in listed.tolist()}
    return torch.tensor([head for head in range(H) if head not in taken], dtype=torch.int64)


def between(n: int) -> torch.Tensor:
    """n float32, up to 512: the bfloat16 from 1 on, and three steps between each and the next, the middle one a tie."""
    return 1 + torch.arange(n) / 512


def full(parameter: torch.Tensor, listed: torch.Tensor, H: int, dtype: torch.dtype) -> torch.Tensor:
    """The parameter on all heads, zero where it is not listed, as a row of H D elements."""
    out = torch.zeros(H, parameter.shape[1], dtype=dtype)
    out[listed] = parameter.to(dtype)
    return out.reshape(-1)


@contextlib.contextmanager
def programs(number: int) -> Iterator[None]:
    """As if the device were filled by this many programs: fewer of them, each over more rows."""
    from lofit_kernels.gpu import launch

    before, launch.PROGRAMS = launch.PROGRAMS, number
    try:
        yield
    finally:
        launch.PROGRAMS = before


def far_rows(T: int, K: int, dtype: torch.dtype, stride: int = 2**30, seed: int = 0) -> torch.Tensor:
    """Random (T, K), rows `stride` elements apart in memory of which only the pages that are touched exist."""
    size = dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    buffer = mmap.mmap(-1, ((T - 1) * stride + K) * size, flags=flags)
    flat = torch.frombuffer(buffer, dtype=dtype)
    far = flat.as_strided((T, K), (stride, 1))
    far.copy_(rows(T, K, dtype, seed=seed))
    return far
