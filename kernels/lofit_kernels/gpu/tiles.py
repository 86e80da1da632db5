"""Tile sizes as data: kernel -> architecture -> head_dim bucket -> block sizes, warps and stages.

Importable without Triton. A new tile is a new row; the machine-code check compiles every row ahead of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# bytes of shared memory one program may use; neither Triton nor ptxas checks it
SHARED_MEMORY = MappingProxyType({"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536})
ANY = "any"


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

# ANY serves every architecture that has no rows of its own
TABLE: Mapping[str, Mapping[str, Rows]] = MappingProxyType(
    {
        "affine_fwd": {ANY: _SWEEP},
        "affine_delta_fwd": {ANY: _SWEEP},
        "affine_bwd": {ANY: _SWEEP_AND_REDUCE},
        "offset_fold": {ANY: _FOLD},
        "offset_bwd": {ANY: _COLUMN_WEIGHTED},
        "column_sum": {ANY: ((None, _tile(4, BLOCK_T=32, BLOCK_N=128)),)},
        "sum_partials": {ANY: ((None, _tile(4, BLOCK_R=32, BLOCK_C=64)),)},
    }
)


def tile(kernel: str, arch: str, D: int) -> Tile:
    """The tile of `kernel` on `arch` for heads of `D` elements (kernels that know no head take any D).

    Raises ValueError for a kernel or an architecture that is not in the table, and for D < 1.
    """
    if kernel not in TABLE:
        raise ValueError(f"no tiles for kernel {kernel!r}; the table has {', '.join(sorted(TABLE))}")
    if arch not in ARCHITECTURES:
        raise ValueError(f"no tiles for architecture {arch!r}; expected one of {', '.join(ARCHITECTURES)}")
    if D < 1:
        raise ValueError(f"head_dim must be at least 1, got {D}")
    rows = TABLE[kernel].get(arch) or TABLE[kernel].get(ANY)
    if rows is None:
        raise ValueError(f"kernel {kernel!r} has no tiles for {arch}; it has {', '.join(TABLE[kernel])}")
    for largest, row in rows:
        if largest is None or largest >= D:
            return row
    raise ValueError(f"kernel {kernel!r} has no tile for head_dim {D} on {arch}; the largest is {rows[-1][0]}")


@lru_cache(maxsize=64)
def _accelerator(index: int) -> str:
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        if name in ("gfx90a", "gfx942", "gfx950"):
            return "gfx942"
        raise ValueError(f"no Triton tiles for {name}; expected an AMD Instinct accelerator (gfx90a, gfx942, gfx950)")
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise ValueError(f"no Triton tiles for compute capability {major}.{minor}; expected 8.0 or newer")
    # consumer parts after sm_100 have neither its tensor memory nor its shared memory
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def architecture(device: torch.device) -> str:
    """The row of the tile table that serves `device`; a CPU device (the Triton interpreter) uses that of sm_90.

    Raises ValueError for a device that no row serves.
    """
    if device.type == "cpu":
        return "sm_90"
    if device.type != "cuda":
        raise ValueError(f"no Triton tiles for device type {device.type!r}; expected 'cuda' (or 'cpu', interpreted)")
    return _accelerator(torch.cuda.current_device() if device.index is None else device.index)
