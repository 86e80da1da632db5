"""What the matrix-product kernels share: walking over tiles, loading and multiplying them, cutting up an epilogue.

Each kernel has one source and two ways to load its operands: through pointers (every architecture, any alignment) or
through tensor descriptors (the bulk copy engine of sm_90 and sm_100). With pointers a program computes one tile, with
descriptors it walks over tiles (persistent): a scale in the main loop of a descriptor kernel that does not walk makes
ptxas serialise the matrix instructions.

Warp specialisation is left out. With Triton 3.7.1 and descriptors made on the host, these kernels do not compile on
sm_90 with 4 warps and come out unchanged with 8; on sm_100 the forward ones spill and ask for more shared and tensor
memory than there is, and the backward one does not compile.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lofit_kernels.gpu import tiles
from lofit_kernels.gpu.launch import INTERPRET, current_arch, unit_columns

LOW_PRECISION = (torch.float16, torch.bfloat16)
# no tile has more rows; offsets inside a tile are 32-bit
MAX_ROWS = 256


@triton.jit
def dot(x, w, acc):
    """acc + x w in float32: on the matrix units for 16-bit operands, IEEE float32 for float32."""
    if INTERPRET and x.dtype == tl.bfloat16:
        # the interpreter multiplies bfloat16 wrongly
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def tile_position(tile, n_rows, n_columns, GROUP: tl.constexpr = 8):
    """(row, column) of tile number `tile` in a grid of n_rows x n_columns tiles.

    GROUP rows are walked together, column by column: neighbours in time share operands in the cache.
    """
    group = tile // (GROUP * n_columns)
    height = tl.minimum(n_rows - group * GROUP, GROUP)
    inside = tile % (GROUP * n_columns)
    return group * GROUP + inside % height, inside // height


@triton.jit
def load_tile(
    x, row, column, n_rows, n_columns, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """x[row : row + BLOCK_R, column : column + BLOCK_C]; beyond n_rows and n_columns zeros.

    A descriptor has bounds of its own: what it reads between n_columns and the end of its rows is not zero.
    """
    if DESCRIPTORS:
        loaded = x.load([row, column])
    else:
        rows = tl.arange(0, BLOCK_R)[:, None]
        columns = column + tl.arange(0, BLOCK_C)[None, :]
        # one 64-bit base and 32-bit offsets inside the tile: fewer registers than 64-bit addresses
        base = x + tl.cast(row, tl.int64) * stride
        loaded = tl.load(
            base + (rows * stride + columns), mask=(rows < n_rows - row) & (columns < n_columns), other=0.0
        )
    return loaded


@triton.jit
def _halves(x):
    half: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def column_slices(x, SLICES: tl.constexpr):
    """The columns of x in SLICES (1, 2 or 4) equal parts: an epilogue that takes them one by one does not spill."""
    if SLICES == 1:
        parts = (x,)
    elif SLICES == 2:
        parts = _halves(x)
    else:
        left, right = _halves(x)
        first, second = _halves(left)
        third, fourth = _halves(right)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def _add_pairs(x, y, other_x, other_y):
    return x + other_x, y + other_y


@triton.jit
def sum_both(x, y):
    """(sum over the rows of x, sum over the rows of y), in one reduction: as two, both layouts of y would be held."""
    # the interpreter has the sum as one operation, but goes through this reduction element by element
    return (tl.sum(x, 0), tl.sum(y, 0)) if INTERPRET else tl.reduce((x, y), 0, _add_pairs)


def operand(x: torch.Tensor, name: str) -> torch.Tensor:
    """`x` (2-D) itself when a tile of it can be addressed by 32-bit offsets, else a contiguous copy."""
    return unit_columns(x, name, MAX_ROWS)


def describable(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can be made of `x` (2-D, neighbouring columns): it rejects empty tensors, overlapping
    rows, and bases or row strides that are not multiples of 16 bytes."""
    stride = x.stride(0) * x.element_size()
    return x.numel() > 0 and x.stride(0) >= x.shape[1] and stride % 16 == 0 and x.data_ptr() % 16 == 0


def describe(x: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A tensor descriptor of `x` that loads tiles of `block` rows and columns."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], list(block))


_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


def descriptor_tiles(kernel: str, arch: str) -> tuple[tiles.Tile, ...]:
    """The tiles of a matrix product whose operands come through descriptors; none where this Triton serialises it."""
    first = tiles.SERIALISED_BEFORE.get(f"{kernel}_tma", {}).get(arch, (0, 0))
    return tiles.every_tile(f"{kernel}_tma", arch) if first <= _TRITON else ()


def matmul_tile(
    kernel: str, operands: tuple[torch.Tensor, ...], T: int, tile: tiles.Tile | None, descriptors: bool | None
) -> tuple[tiles.Tile, bool]:
    """The tile of a matrix product for `T` rows, and whether its operands are loaded through descriptors.

    Descriptors are used (`None`) where the table has such tiles for the architecture, the dtype has 16 bits and every
    operand can be described. Raises ValueError for descriptors of operands that cannot, and for an unsupported dtype.
    """
    dtype, arch = operands[0].dtype, current_arch(operands[0])
    if any(x.dtype != dtype for x in operands):
        raise ValueError(f"{kernel} needs operands of one dtype, got {', '.join(str(x.dtype) for x in operands)}")
    if dtype != torch.float32 and dtype not in LOW_PRECISION:
        raise ValueError(f"{kernel} computes in float16, bfloat16 and float32, got {dtype}")
    fits = dtype in LOW_PRECISION and all(describable(x) for x in operands)
    if descriptors and not fits:
        raise ValueError(f"{kernel}: these operands cannot be described (empty, {dtype}, or not aligned to 16 bytes)")
    if descriptors is None:
        descriptors = fits and bool(descriptor_tiles(kernel, arch))
    if tile is None:
        suffix = "_tma" if descriptors else "_float32" if dtype == torch.float32 else ""
        tile = tiles.tile(kernel + suffix, arch, max(T, 1))
    return tile, descriptors


@lru_cache(maxsize=64)
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_for(n_tiles: int, like: torch.Tensor, descriptors: bool) -> int:
    """One program per tile through pointers; through descriptors no more than stand side by side on the device."""
    if not descriptors:
        return n_tiles
    # the interpreter runs one program after the other: enough of them for some to walk over several tiles
    return min(n_tiles, _multiprocessors(like.get_device()) if like.is_cuda else 3)
