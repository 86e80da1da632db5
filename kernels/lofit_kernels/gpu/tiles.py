"""Tile sizes as data: kernel -> architecture -> size bucket -> block sizes, warps and stages.

The size is head_dim, for the matrix products and the column sum the number of rows T: the launcher looks it up on the
host, so that T itself is compiled into nothing. A matrix product has a row of its own for operands loaded through
tensor descriptors (`NAME_tma`) and for float32 (`NAME_float32`: IEEE products, which NVIDIA's matrix units do not
compute).

Importable without Triton. A new tile is a new row; the machine-code check compiles every row ahead of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

import torch

from lofit_kernels.devices import unserved

# architecture -> bytes of shared memory one program may use; neither Triton nor ptxas checks it
SHARED_MEMORY: Mapping[str, int] = MappingProxyType(
    {
        "sm_80": 166912,
        "sm_86": 101376,
        "sm_89": 101376,
        "sm_90": 232448,
        "sm_100": 232448,
        "sm_103": 232448,
        "sm_120": 101376,
        "gfx942": 65536,
        "gfx950": 163840,
    }
)
ARCHITECTURES = tuple(SHARED_MEMORY)
# architecture -> whose rows serve it where it has none of its own; compiled and checked as itself all the same
SERVED_BY: Mapping[str, str] = MappingProxyType(
    {"sm_86": "sm_80", "sm_89": "sm_80", "sm_103": "sm_100", "sm_120": "sm_80", "gfx950": "gfx942"}
)
ANY = "any"
# a column sum over no more rows than these is one launch: few programs, of a narrow strip each, fill the chip enough
ONE_STAGE_ROWS = 2048


@dataclass(frozen=True)
class Tile:
    """Block sizes by their name in the kernel (`BLOCK_T`, ...), warps per program and software-pipeline stages."""

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int] = field(hash=False)

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]

    def options(self) -> dict[str, int]:
        """Everything as keyword arguments of a kernel launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.blocks.values())
        return f"{sizes} w{self.num_warps} s{self.num_stages}"


def _tile(num_warps: int, num_stages: int = 1, **blocks: int) -> Tile:
    return Tile(num_warps, num_stages, MappingProxyType(blocks))


# rows are (largest head_dim served, tile), narrowest first; None serves every head_dim that is left
Rows = tuple[tuple[int | None, Tile], ...]

# a pass over T x D: about 32 elements per thread, so that four 16-byte loads are in flight per thread and tensor
_SWEEP: Rows = (
    (64, _tile(4, BLOCK_T=64)),
    (128, _tile(4, BLOCK_T=32)),
    (256, _tile(4, BLOCK_T=16)),
    (512, _tile(8, BLOCK_T=16)),
    (None, _tile(8, BLOCK_T=4)),
)
# the same with two accumulators held across the rows: half the elements per thread, a quarter for D <= 64, where
# 4 warps leave ptxas spilling one register for some dtypes
_SWEEP_AND_REDUCE: Rows = (
    (64, _tile(8, BLOCK_T=32)),
    (128, _tile(4, BLOCK_T=16)),
    (256, _tile(4, BLOCK_T=8)),
    (512, _tile(8, BLOCK_T=8)),
    (None, _tile(8, BLOCK_T=2)),
)
# rows of W against a few heads: small blocks of N, because N alone has to fill the chip
_FOLD: Rows = (
    (64, _tile(4, BLOCK_N=8, BLOCK_S=4)),
    (128, _tile(4, BLOCK_N=8, BLOCK_S=4)),
    (256, _tile(4, BLOCK_N=8, BLOCK_S=2)),
    (None, _tile(8, BLOCK_N=4, BLOCK_S=1)),
)
_COLUMN_WEIGHTED: Rows = (
    (64, _tile(4, BLOCK_N=32)),
    (128, _tile(4, BLOCK_N=16)),
    (256, _tile(4, BLOCK_N=8)),
    (None, _tile(8, BLOCK_N=4)),
)


# (rows, columns, step of the inner sum) of an output tile, warps, stages, column slices of the epilogue
Sizes = tuple[int, int, int, int, int, int]


def _matmul(names: tuple[str, str, str], small: Sizes, middle: Sizes, large: Sizes) -> Rows:
    """One row for T up to 64, one for T up to 512, one for more: fewer rows of tiles leave multiprocessors idle."""

    def row(sizes: Sizes) -> Tile:
        blocks = dict(zip(names, sizes, strict=False))
        return _tile(sizes[3], sizes[4], **blocks, SLICES=sizes[5])

    return (64, row(small)), (512, row(middle)), (None, row(large))


def _forward(*sizes: Sizes) -> Rows:
    return _matmul(("BLOCK_T", "BLOCK_N", "BLOCK_K"), *sizes)


def _backward(*sizes: Sizes) -> Rows:
    return _matmul(("BLOCK_T", "BLOCK_K", "BLOCK_N"), *sizes)


_FORWARD: Mapping[str, Rows] = {
    "sm_80": _forward((64, 128, 32, 4, 3, 2), (128, 128, 32, 8, 4, 2), (128, 256, 32, 8, 3, 4)),
    # a step of 64 in the large tile spills on Triton 3.6 or 3.9: twice the addresses are held
    "sm_90": _forward((64, 128, 64, 8, 4, 2), (128, 128, 64, 8, 4, 2), (128, 256, 32, 8, 4, 4)),
    "sm_100": _forward((64, 128, 64, 8, 4, 2), (128, 128, 64, 8, 4, 2), (128, 256, 32, 8, 4, 4)),
    # a step of 32 in the large tile spills 8 bytes in 3 stages
    "sm_120": _forward((64, 128, 32, 4, 3, 2), (128, 128, 32, 8, 4, 2), (128, 256, 16, 8, 4, 4)),
    # a step of 64 makes more masks than there are scalar registers
    "gfx942": _forward((64, 128, 32, 8, 2, 2), (128, 128, 32, 8, 2, 2), (128, 256, 64, 8, 2, 4)),
}
_FORWARD_TMA: Mapping[str, Rows] = {
    "sm_90": _forward((64, 128, 64, 4, 4, 2), (128, 128, 64, 8, 4, 2), (128, 256, 64, 8, 4, 4)),
    # found by trying: with other warps or slices, ptxas of sm_100 aims for too few registers on some Triton and spills
    "sm_100": _forward((64, 128, 64, 4, 4, 4), (128, 128, 64, 4, 4, 2), (128, 256, 64, 8, 4, 4)),
}
_BACKWARD: Mapping[str, Rows] = {
    "sm_80": _backward((64, 128, 32, 4, 4, 2), (128, 128, 32, 8, 4, 2), (128, 256, 32, 8, 4, 4)),
    "sm_90": _backward((64, 128, 64, 4, 4, 2), (128, 128, 64, 8, 4, 2), (128, 256, 64, 8, 3, 4)),
    "sm_100": _backward((64, 128, 64, 4, 4, 4), (128, 128, 64, 8, 4, 4), (128, 256, 64, 8, 3, 4)),
    "gfx942": _backward((64, 128, 32, 8, 2, 2), (128, 128, 32, 8, 2, 2), (128, 256, 64, 8, 2, 4)),
}
_BACKWARD_TMA: Mapping[str, Rows] = {
    "sm_90": _backward((64, 128, 64, 4, 4, 2), (128, 128, 64, 8, 4, 2), (128, 256, 64, 8, 4, 4)),
    "sm_100": _backward((64, 128, 64, 4, 4, 2), (128, 128, 64, 4, 4, 2), (128, 256, 64, 8, 4, 4)),
}
_FORWARD_FLOAT32: Rows = ((None, _tile(4, 2, BLOCK_T=64, BLOCK_N=64, BLOCK_K=16, SLICES=1)),)
_BACKWARD_FLOAT32: Rows = ((None, _tile(4, 2, BLOCK_T=64, BLOCK_K=64, BLOCK_N=16, SLICES=1)),)

# ANY serves every architecture that has no rows of its own
TABLE: Mapping[str, Mapping[str, Rows]] = MappingProxyType(
    {
        "affine_fwd": {ANY: _SWEEP},
        "affine_delta_fwd": {ANY: _SWEEP},
        "affine_bwd": {ANY: _SWEEP_AND_REDUCE},
        "offset_fold": {ANY: _FOLD},
        "offset_bwd": {ANY: _COLUMN_WEIGHTED},
        "grouped_fold": {ANY: _FOLD},
        "grouped_bwd": {ANY: _COLUMN_WEIGHTED},
        # the size is the number of rows: 64 bytes of each of many rows, or 256 bytes of a few
        "column_sum": {
            ANY: (
                (ONE_STAGE_ROWS, _tile(8, BLOCK_T=64, BLOCK_N=32, AT_ONCE=4)),
                (None, _tile(4, BLOCK_T=32, BLOCK_N=128, AT_ONCE=1)),
            ),
            # a warp has twice as many threads there: half the warps, for loads of 16 bytes
            "gfx942": (
                (ONE_STAGE_ROWS, _tile(4, BLOCK_T=64, BLOCK_N=32, AT_ONCE=4)),
                (None, _tile(4, BLOCK_T=32, BLOCK_N=128, AT_ONCE=1)),
            ),
        },
        "delta_linear": _FORWARD,
        "delta_linear_tma": _FORWARD_TMA,
        "delta_linear_float32": {ANY: _FORWARD_FLOAT32},
        "prologue_linear": _FORWARD,
        "prologue_linear_tma": _FORWARD_TMA,
        "prologue_linear_float32": {ANY: _FORWARD_FLOAT32},
        "affine_linear_bwd": _BACKWARD,
        "affine_linear_bwd_tma": _BACKWARD_TMA,
        "affine_linear_bwd_float32": {ANY: _BACKWARD_FLOAT32},
        "sum_partials": {ANY: ((None, _tile(4, BLOCK_R=32, BLOCK_C=64)),)},
    }
)


# what is missing from TABLE on purpose: end of a kernel's name -> architecture -> why
LEFT_OUT: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "_tma": {
            **dict.fromkeys(
                ("sm_80", "sm_86", "sm_89"),
                "no bulk copy engine: descriptors compile to plain loads without asynchronous copies",
            ),
            "sm_120": "its matrix instructions read registers, as those of sm_80 do: it takes the same kernels",
            **dict.fromkeys(("gfx942", "gfx950"), "no bulk copy engine"),
        },
        "_float32": {
            ANY: "one tile of 64x64: NVIDIA's matrix units compute no IEEE float32, so larger ones have nothing to feed"
        },
    }
)

# matrix products through descriptors -> architecture -> the first Triton whose ptxas does not serialise them (C7515)
SERIALISED_BEFORE: Mapping[str, Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"prologue_linear_tma": {"sm_90": (3, 7)}}
)


def _rows(kernel: str, arch: str) -> Rows:
    by_arch = TABLE[kernel]
    return by_arch.get(arch) or by_arch.get(SERVED_BY.get(arch, arch)) or by_arch.get(ANY) or ()


def every_tile(kernel: str, arch: str) -> tuple[Tile, ...]:
    """All tiles of `kernel` on `arch` in the table's order, none where it has no rows."""
    return tuple(row for _, row in _rows(kernel, arch))


def tile(kernel: str, arch: str, size: int) -> Tile:
    """The tile of `kernel` on `arch` for heads of `size` elements, for a matrix product with `size` rows.

    Kernels that know neither take any size. Raises ValueError for a kernel or an architecture that is not in the table,
    and for a size below 1.
    """
    if kernel not in TABLE:
        raise ValueError(f"no tiles for kernel {kernel!r}; the table has {', '.join(sorted(TABLE))}")
    if arch not in ARCHITECTURES:
        raise ValueError(f"no tiles for architecture {arch!r}; expected one of {', '.join(ARCHITECTURES)}")
    if size < 1:
        raise ValueError(f"the size must be at least 1, got {size}")
    rows = _rows(kernel, arch)
    if not rows:
        raise ValueError(f"kernel {kernel!r} has no tiles for {arch}; it has {', '.join(TABLE[kernel])}")
    for largest, row in rows:
        if largest is None or largest >= size:
            return row
    raise ValueError(f"kernel {kernel!r} has no tile for size {size} on {arch}; the largest is {rows[-1][0]}")


# what tensor cores and shared memory a compute capability has: (major, minor) or major -> rows of the table
_CAPABILITIES: Mapping[tuple[int, ...], str] = MappingProxyType(
    {
        (8,): "sm_80",
        (8, 6): "sm_86",
        (8, 9): "sm_89",
        (9,): "sm_90",
        (10,): "sm_100",
        (10, 3): "sm_103",
    }
)
# beyond these, whatever is safe on the least of them: no tensor memory, 99 KiB of shared memory
_NEWEST = "sm_120"
_INSTINCT: Mapping[str, str] = MappingProxyType({"gfx90a": "gfx942", "gfx942": "gfx942", "gfx950": "gfx950"})


def of_capability(major: int, minor: int) -> str:
    """The rows of the table that serve a CUDA compute capability. Raises ValueError below 8.0."""
    if major < 8:
        raise ValueError(f"no Triton tiles for compute capability {major}.{minor}; expected 8.0 or newer")
    return _CAPABILITIES.get((major, minor)) or _CAPABILITIES.get((major,)) or _NEWEST


@lru_cache(maxsize=64)
def _accelerator(index: int) -> str:
    refusal = unserved(torch.device("cuda", index))
    if refusal is not None:
        raise ValueError(refusal)
    if torch.version.hip is not None:
        return _INSTINCT[torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]]
    return of_capability(*torch.cuda.get_device_capability(index))


def architecture(device: torch.device) -> str:
    """The row of the tile table that serves `device`; a CPU device (the Triton interpreter) uses that of sm_90.

    Raises ValueError for a device that no row serves.
    """
    if device.type == "cpu":
        return "sm_90"
    if device.type != "cuda":
        raise ValueError(f"no Triton tiles for device type {device.type!r}; expected 'cuda' (or 'cpu', interpreted)")
    return _accelerator(torch.cuda.current_device() if device.index is None else device.index)
