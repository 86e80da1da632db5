"""Every compile-time specialisation of every kernel, read off the launchers themselves.

A case is one call of a launcher on empty tensors. Run under `launch.recording` it yields the launches it would make,
and Triton's own binder turns their arguments into the signature, constants and alignment attributes that would be
compiled. So a new kernel needs one row in CASES, and the list cannot drift from what runs. Needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lofit_kernels.gpu import affine, linear_backward, linear_forward, offset, offset_grouped
from lofit_kernels.gpu.launch import recording
from lofit_kernels.gpu.matmul import descriptor_tiles
from lofit_kernels.gpu.tiles import ARCHITECTURES, ONE_STAGE_ROWS, Tile, every_tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256)
SAMPLE_DTYPES = (torch.bfloat16,)
SAMPLE_HEAD_DIMS = (80, 128)
# sizes of the empty tensors: any that are multiples of 16 give the same code
T, N, H = 64, 512, 32
# the compile-time sizes that a tile is shown by
SHOWN = ("BLOCK_T", "BLOCK_N", "BLOCK_K", "BLOCK_D", "BLOCK_S", "BLOCK_R", "BLOCK_C", "SLICES")


def target(arch: str) -> GPUTarget:
    """What Triton compiles for on `arch`."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Inputs:
    """Empty arguments for a launcher, by the names used everywhere; `heads` lists 4 of the H heads."""

    dtype: torch.dtype
    D: int

    def __post_init__(self) -> None:
        K = H * self.D
        for name, shape, dtype in (
            ("z", (T, K), self.dtype),
            ("G", (T, K), self.dtype),
            ("dY", (T, N), self.dtype),
            ("W", (N, K), self.dtype),
            ("b", (N,), self.dtype),
            ("a", (4, self.D), torch.float32),
            ("sum_dY", (N,), torch.float32),
            ("addend", (N,), torch.float32),
        ):
            object.__setattr__(self, name, torch.empty(shape, dtype=dtype))
        object.__setattr__(self, "heads", torch.arange(4))

    def backward(self, dz: bool, da: bool, dv: bool, inplace: bool = False, scaled: bool = True) -> None:
        """Call affine_bwd for these gradients."""
        a, a_heads = (self.a, self.heads) if scaled else (None, None)
        affine.affine_bwd(self.G, self.z, a, a_heads, self.heads, self.D, (dz, da, dv), inplace)

    def projection(self, tile: Tile, launcher: Callable[..., Any], tma: bool, bias: bool) -> None:
        """Call delta_linear or prologue_linear with this tile."""
        c = self.addend if bias else None
        launcher(self.z, self.W, c, self.a, self.heads, self.D, tile=tile, descriptors=tma)

    def projection_bwd(self, tile: Tile, tma: bool, needs: tuple[bool, bool, bool], scaled: bool = True) -> None:
        """Call affine_linear_bwd with this tile for these gradients."""
        a, a_heads = (self.a, self.heads) if scaled else (None, None)
        args = (self.dY, self.W, self.z, a, a_heads, self.heads, self.D, needs)
        linear_backward.affine_linear_bwd(*args, tile=tile, descriptors=tma)


@dataclass(frozen=True)
class Case:
    """A call of a launcher. `narrow`: it may load single 16-bit values. `mma`: in 16 bits it must use the matrix units.

    `tiles` names a matrix product in the tile table: the case is then called once for each of its tiles, as
    call(inputs, tile), for bfloat16; for the other dtypes with the last tile only.
    """

    name: str
    call: Callable[..., Any]
    sample: bool = False
    narrow: bool = False
    mma: bool = False
    tiles: str | None = None

    def variants(self, arch: str, dtype: torch.dtype) -> tuple[Tile | None, ...]:
        """The tiles to call it with, None for a call without one."""
        if self.tiles is None:
            return (None,)
        if dtype == torch.float32:
            return () if self.tiles.endswith("_tma") else every_tile(f"{self.tiles}_float32", arch)
        kernel = self.tiles.removesuffix("_tma")
        found = every_tile(kernel, arch) if kernel == self.tiles else descriptor_tiles(kernel, arch)
        return found if dtype == torch.bfloat16 else found[-1:]


def _projections() -> Iterator[Case]:
    """The matrix products: every subset of what they can leave out, through pointers and through descriptors."""
    for tma in (False, True):
        end = "_tma" if tma else ""
        for launcher in (linear_forward.delta_linear, linear_forward.prologue_linear):
            for bias in (False, True):
                call = partial(Inputs.projection, launcher=launcher, tma=tma, bias=bias)
                name = launcher.__name__ + end
                yield Case(f"{name}{' b' * bias}", call, sample=bias, mma=True, tiles=name)
        for needs in product((True, False), repeat=3):
            if any(needs):
                call = partial(Inputs.projection_bwd, tma=tma, needs=needs)
                name = f"affine_linear_bwd{end}"
                asked = " ".join(grad for grad, need in zip(("dz", "da", "dv"), needs, strict=True) if need)
                yield Case(f"{name} {asked}", call, sample=all(needs), mma=True, tiles=name)
        call = partial(Inputs.projection_bwd, tma=tma, needs=(True, False, True), scaled=False)
        yield Case(f"affine_linear_bwd{end} dz dv, no a", call, mma=True, tiles=f"affine_linear_bwd{end}")


CASES: tuple[Case, ...] = (
    Case("affine_fwd a", lambda i: affine.affine_fwd(i.z, i.a, i.heads, None, None, i.D)),
    Case("affine_fwd v", lambda i: affine.affine_fwd(i.z, None, None, i.a, i.heads, i.D)),
    Case("affine_fwd a v", lambda i: affine.affine_fwd(i.z, i.a, i.heads, i.a, i.heads, i.D), sample=True),
    Case("affine_fwd a dithered", lambda i: affine.affine_fwd(i.z, i.a, i.heads, None, None, i.D, True)),
    Case("affine_fwd v dithered", lambda i: affine.affine_fwd(i.z, None, None, i.a, i.heads, i.D, True)),
    Case(
        "affine_fwd a v dithered",
        lambda i: affine.affine_fwd(i.z, i.a, i.heads, i.a, i.heads, i.D, True),
        sample=True,
    ),
    Case("affine_delta_fwd", lambda i: affine.affine_delta_fwd(i.z, i.a, i.heads, i.D), sample=True),
    Case("affine_bwd dz", lambda i: i.backward(True, False, False)),
    Case("affine_bwd da", lambda i: i.backward(False, True, False)),
    Case("affine_bwd dv", lambda i: i.backward(False, False, True)),
    Case("affine_bwd dz da", lambda i: i.backward(True, True, False)),
    Case("affine_bwd dz dv", lambda i: i.backward(True, False, True)),
    Case("affine_bwd dz dv, no a", lambda i: i.backward(True, False, True, scaled=False)),
    Case("affine_bwd da dv", lambda i: i.backward(False, True, True)),
    Case("affine_bwd dz da dv", lambda i: i.backward(True, True, True), sample=True),
    Case("affine_bwd dz in place", lambda i: i.backward(True, False, False, inplace=True)),
    Case("affine_bwd dz da in place", lambda i: i.backward(True, True, False, inplace=True), sample=True),
    Case("affine_bwd dz dv in place", lambda i: i.backward(True, False, True, inplace=True)),
    Case("affine_bwd dz da dv in place", lambda i: i.backward(True, True, True, inplace=True)),
    Case("offset_fold", lambda i: offset.offset_fold(i.W, i.a, i.heads, None), sample=True),
    Case("offset_fold b", lambda i: offset.offset_fold(i.W, i.a, i.heads, i.b), narrow=True),
    Case("offset_fold b float32", lambda i: offset.offset_fold(i.W, i.a, i.heads, i.sum_dY)),
    Case("column_sum", lambda i: offset.column_sum(i.dY), sample=True),
    Case(
        "column_sum in two stages",
        lambda i: offset.column_sum(i.dY.expand(2 * ONE_STAGE_ROWS // T, T, N).flatten(0, 1)),
    ),
    Case("offset_bwd", lambda i: offset.offset_bwd(i.sum_dY, i.W, i.heads, i.D), sample=True),
    Case("grouped_fold", lambda i: offset_grouped.grouped_fold([i.W] * 3, [i.a] * 3, [i.heads] * 3), sample=True),
    Case(
        "grouped_bwd", lambda i: offset_grouped.grouped_bwd([i.sum_dY] * 3, [i.W] * 3, [i.heads] * 3, i.D), sample=True
    ),
    *_projections(),
)


@dataclass(frozen=True)
class Specialisation:
    """One kernel as one launch compiles it: what `triton.compile(ASTSource(...), target, options)` takes, and where
    it comes from (`case`, `launch` of that case, which of its tiles (`variant`), `arch`, `dtype`, `D`)."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    blocks: dict[str, int]
    case: Case
    launch: int
    variant: int
    arch: str
    dtype: torch.dtype
    D: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def tile(self) -> str:
        """Block sizes, warps and stages, to read."""
        sizes = " ".join(f"{name.removeprefix('BLOCK_')}={size}" for name, size in self.blocks.items())
        return f"{sizes} w{self.options['num_warps']} s{self.options['num_stages']}"

    @property
    def is_product(self) -> bool:
        """Whether this launch is the matrix product of its case, and no second stage of it."""
        return self.case.mma and (self.case.tiles or "").startswith(self.name[1:].removesuffix("_kernel"))

    @property
    def key(self) -> str:
        """Equal for specialisations that compile to the same code."""
        compiled_in = (self.signature, self.constexprs, self.attrs, sorted(self.options.items(), key=str))
        return repr((self.name, self.arch, *compiled_in))


def specialise(case: Case, arch: str, dtype: torch.dtype, D: int) -> list[Specialisation]:
    """What the launches of `case` compile, in order. Raises RuntimeError in a process that interprets Triton."""
    backend = make_backend(target(arch))
    launches = []
    for variant, tile in enumerate(case.variants(arch, dtype)):
        with recording(arch) as recorded:
            case.call(Inputs(dtype, D)) if tile is None else case.call(Inputs(dtype, D), tile)
        launches += [(variant, *made) for made in recorded.launches]
    found = []
    for number, (variant, kernel, args, given) in enumerate(launches):
        if not hasattr(kernel, "params"):
            raise RuntimeError("kernels cannot be compiled in a process that runs Triton's interpreter")
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **given)
        options, signature, constexprs, attrs = kernel._pack_args(backend, given, bound, specialization, options)
        blocks = {name: value for name, value in given.items() if name in SHOWN}
        place = (case, number, variant, arch, dtype, D)
        found.append(Specialisation(kernel, signature, constexprs, attrs, options.__dict__, blocks, *place))
    return found


def catalogue(
    sample: bool = False, architectures: Sequence[str] = ARCHITECTURES, cases: Sequence[Case] = CASES
) -> Iterator[Specialisation]:
    """Every distinct specialisation; with `sample` a few that cover every kernel on every architecture."""
    seen = set()
    for arch in architectures:
        for case in cases:
            if sample and not case.sample:
                continue
            for dtype in SAMPLE_DTYPES if sample else DTYPES:
                for D in SAMPLE_HEAD_DIMS if sample else HEAD_DIMS:
                    for found in specialise(case, arch, dtype, D):
                        if found.key not in seen and not (sample and found.variant):
                            seen.add(found.key)
                            yield found
