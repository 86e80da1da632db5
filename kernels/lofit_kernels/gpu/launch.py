"""What the kernel files share: rounding, head lookup, launching, and the second stage of a deterministic sum."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from lofit_kernels.gpu import tiles

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
if INTERPRET:
    from lofit_kernels.gpu import mended_interpreter

    mended_interpreter.mend()

# enough programs for every multiprocessor to hold several, few enough for the partial sums to stay cheap
PROGRAMS = 2048
# rows a lane adds one after the other before the tree sums begin: bounds the rounding error of a long sum
BLOCKS_PER_PROGRAM = 64
# what sums are carried in, for Triton and for torch
ACCUMULATOR = {
    torch.float16: (tl.float32, torch.float32),
    torch.bfloat16: (tl.float32, torch.float32),
    torch.float32: (tl.float32, torch.float32),
    torch.float64: (tl.float64, torch.float64),
}


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x rounded to the nearest value of `dtype`, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        # the interpreter truncates float32 to bfloat16 and flushes its subnormals: round the bits instead
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        rounded = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def head_row(heads, n_heads, head, BLOCK_HEADS: tl.constexpr):
    """The i with heads[i] = head, or -1. A search in the kernel costs one cached load and saves building a map."""
    if heads is None:
        row = head * 0 - 1
    else:
        index = tl.arange(0, BLOCK_HEADS)
        listed = tl.load(heads + index, mask=index < n_heads, other=-1)
        row = tl.max(tl.where(listed == head, index, -1), 0)
    return row


@triton.jit
def listed_head(scale_heads, offset_heads, n_scale, slot):
    """The head at `slot` of [scale_heads | offset_heads], either of which may be missing."""
    head = slot * 0
    if scale_heads is not None:
        head += tl.load(scale_heads + slot, mask=slot < n_scale, other=0).to(tl.int32)
    if offset_heads is not None:
        head += tl.load(offset_heads + slot - n_scale, mask=slot >= n_scale, other=0).to(tl.int32)
    return head


@triton.jit(do_not_specialize=["R", "C", "C_first"])
def _sum_partials_kernel(
    partials, first, second, R, C, C_first, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr
):
    """[first | second] = sum_r partials[r]: columns below C_first go to `first`, the others to `second`."""
    n_columns = C * UNIT
    n_first = C_first * UNIT
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < n_columns
    total = tl.zeros((BLOCK_R, BLOCK_C), partials.dtype.element_ty)
    for start in range(0, R, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        addresses = partials + rows[:, None].to(tl.int64) * n_columns + columns[None, :]
        total += tl.load(addresses, mask=(rows < R)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, 0)
    tl.store(first + columns, result, mask=columns < n_first)
    if second is not None:
        tl.store(second + (columns - n_first), result, mask=inside & (columns >= n_first))


@dataclass
class Recording:
    """The launches made under `recording`: (kernel, positional arguments, keyword arguments), in order."""

    arch: str
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


# a plain global, not a context variable: autograd runs backward launches on a thread of its own
_active: Recording | None = None


@contextlib.contextmanager
def recording(arch: str) -> Iterator[Recording]:
    """Within it launchers note their launches, with the tiles of `arch`, and run none: results are uninitialised.

    Needs no GPU. For counting launches and for compiling ahead of time exactly what would run. Not for two threads.
    """
    global _active
    previous, _active = _active, Recording(arch)
    try:
        yield _active
    finally:
        _active = previous


def current_arch(like: torch.Tensor) -> str:
    """The architecture that `like` is on; under `recording` the recorded one."""
    return _active.arch if _active else tiles.architecture(like.device)


def planned(plan: Callable) -> Callable:
    """plan(arch, *sizes), computed once for the same sizes: called as found(like, *sizes), for the device of `like`.

    What a launch needs beside its tensors depends on their sizes alone, and takes longer to compute than to look up.
    """
    remembered = lru_cache(maxsize=4096)(lambda arch, programs, *sizes: plan(arch, *sizes))

    def found(like: torch.Tensor, *sizes: Any) -> Any:
        arch = _active.arch if _active else tiles.architecture(like.device)
        return remembered(arch, PROGRAMS, *sizes)

    return found


def head_options(kernel: str, arch: str, D: int, unit: int, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of a kernel that takes whole heads: D, the unit of strides, the dtype of sums, the tile."""
    tile = tiles.tile(kernel, arch, D)
    return {"D": D, "BLOCK_D": power_of_two(D), "UNIT": unit, "ACC": ACCUMULATOR[dtype][0], **tile.options()}


@planned
def _head_plan(arch: str, kernel: str, D: int, unit: int, dtype: torch.dtype) -> dict[str, Any]:
    return head_options(kernel, arch, D, unit, dtype)


def head_plan(kernel: str, like: torch.Tensor, D: int, unit: int) -> dict[str, Any]:
    """`head_options` for the dtype and the device of `like`: put together once, and shared, so not to be changed."""
    return _head_plan(like, kernel, D, unit, like.dtype)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run `programs` programs of `kernel` on the device of the first argument (Triton itself uses the current one),
    which may be a tensor descriptor."""
    if _active is not None:
        _active.launches.append((kernel, args, options))
        return
    first = args[0]
    device = (first if isinstance(first, torch.Tensor) else first.base).get_device()
    # a CPU, where the interpreter runs, has no number
    if device < 0 or device == torch.cuda.current_device():
        kernel[(programs,)](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **options)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own is made for its compiler, and takes twenty times as long on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n >= 1; see `cdiv`."""
    return 1 << (n - 1).bit_length()


def accumulator(x: torch.Tensor, name: str) -> tuple[tl.dtype, torch.dtype]:
    """The dtype sums over `x` are carried in, for Triton and for torch. Raises ValueError naming an unsupported one."""
    if x.dtype not in ACCUMULATOR:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    return ACCUMULATOR[x.dtype]


def unit_columns(x: torch.Tensor, name: str, rows: int = 1) -> torch.Tensor:
    """`x` (2-D) itself when neighbouring columns are neighbours in memory, else a contiguous copy.

    A copy, too, when `rows` rows span 2^31 elements: that many row strides are one 32-bit number in the kernel, which
    multiplies by a 64-bit row only then.
    """
    strides = x.stride()
    if len(strides) != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(x.shape)}")
    near = strides[0] * rows < 2**31
    return x if near and (strides[1] == 1 or x.shape[1] == 1) else x.contiguous()


def count_heads(x: torch.Tensor, name: str, head_dim: int) -> int:
    """H, the number of heads in the columns of `x` (R, H D). Raises ValueError when head_dim does not divide them."""
    if head_dim < 1 or x.shape[1] % head_dim:
        raise ValueError(f"head_dim {head_dim} does not divide the {x.shape[1]} columns of {name}")
    return x.shape[1] // head_dim


def any_listed(values: torch.Tensor | None, heads: torch.Tensor | None) -> bool:
    """Whether there are values (h, D), for at least one head."""
    return values is not None and heads is not None and heads.shape[0] > 0


def common_unit(*sizes: int) -> int:
    """8 when it divides all sizes, else 1. Kernels take sizes and strides in this unit.

    Triton itself only notes multiples of 16: a stride of 72 would turn 16-byte accesses into 2-byte ones.
    """
    for size in sizes:
        if size % 8:
            return 1
    return 8


def split_rows(n_rows: int, block: int, across: int) -> tuple[int, int]:
    """(blocks of rows per program, number of row chunks) when `across` programs stand side by side on each chunk."""
    blocks = -(-n_rows // block)
    per_program = max(1, min(BLOCKS_PER_PROGRAM, blocks * across // PROGRAMS))
    return per_program, -(-blocks // per_program)


def sum_partials(partials: torch.Tensor, n_first: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums over the rows of `partials` (R, C) in a fixed order: columns [0, n_first) and, when there are any, the rest.

    Two tensors rather than two views of one, because results of a custom operator must not share storage.
    """
    R, C = partials.shape
    if R == 1 and n_first == C:
        return partials.view(C), None
    programs, n_columns, n_of_first, options = _sum_plan(partials, C, n_first)
    dtype, device = partials.dtype, partials.device
    first = torch.empty(n_first, dtype=dtype, device=device)
    second = torch.empty(C - n_first, dtype=dtype, device=device) if n_first < C else None
    launch(_sum_partials_kernel, programs, partials, first, second, R, n_columns, n_of_first, **options)
    return first, second


@planned
def _sum_plan(arch: str, C: int, n_first: int) -> tuple[int, int, int, dict[str, Any]]:
    """(programs, columns and columns of the first result in the common unit, keyword arguments) of `sum_partials`."""
    tile, unit = tiles.tile("sum_partials", arch, 1), common_unit(C, n_first)
    return cdiv(C, tile["BLOCK_C"]), C // unit, n_first // unit, {"UNIT": unit, **tile.options()}


def head_gradients(
    partials: torch.Tensor | None, counts: tuple[int, int], head_dim: int, needs: tuple[bool, bool], like: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """da (counts[0], D) and dv (counts[1], D) of their partial sums (R, (counts[0] + counts[1]) D); None if not needed.

    Zeros without partial sums, when there were no rows to sum or no heads. like: of the dtype that was summed.
    """
    if not needs[0] and not needs[1]:
        return None, None
    totals = (None, None) if partials is None else sum_partials(partials, counts[0] * head_dim)
    gradients: list[torch.Tensor | None] = [None, None]
    for i, total in enumerate(totals):
        if needs[i] and total is not None:
            gradients[i] = total.view(counts[i], head_dim)
        elif needs[i]:
            gradients[i] = torch.zeros((counts[i], head_dim), dtype=accumulator(like, "grad")[1], device=like.device)
    return gradients[0], gradients[1]
