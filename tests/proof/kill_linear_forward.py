"""Cases of the forward family: the projection with the scale inside, in delta and in prologue form."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lofit_kernels.gpu.linear_forward import delta_linear, prologue_linear
from lofit_kernels.gpu.tiles import Tile
from tests.accuracy_rule import check
from tests.proof.kernel_inputs import Case, between, case, far_rows, full, heads, rows, values, vector
from tests.proof.watch import Watch

CASES: list[Case] = []
H = 5
# the widest rows that are read where they are
NEAR = 2**23 - 8
LISTED = heads(4, 0, 1)
Form = Callable[..., torch.Tensor]


def _tile(slices: int, block: int = 16) -> Tile:
    """`block` rows; smaller than any of the table, and no two sizes alike."""
    return Tile(4, 2, {"BLOCK_T": block, "BLOCK_N": 64, "BLOCK_K": 32, "SLICES": slices})


def _by(dtype: torch.dtype, z: torch.Tensor, weight: torch.Tensor, c: torch.Tensor | None, a: torch.Tensor):
    """Every step in `dtype`, as the hook of an eager model computes it."""
    wide = torch.promote_types(dtype, torch.float32)
    y = (z.to(wide) * (1 + full(a, LISTED, H, wide))).to(dtype).contiguous() @ weight.to(dtype).contiguous().T
    return y if c is None else y + c.to(dtype)


@case(CASES, "prologue, rows 2^30 elements apart", prologue_linear, 3, 12, 16, torch.float16, stride=2**30)
@case(CASES, "delta, rows 2^30 elements apart", delta_linear, 3, 12, 16, torch.float16, stride=2**30)
@case(CASES, "the last row 2^31 elements away", delta_linear, 390, 12, 16, torch.float16, block=128, stride=NEAR)
@case(CASES, "prologue, float32", prologue_linear, 18, 70, 20, torch.float32, extra=3, slices=2)
@case(CASES, "delta, float32", delta_linear, 18, 70, 20, torch.float32, extra=3, slices=2)
@case(CASES, "prologue, descriptors", prologue_linear, 40, 72, 24, torch.float16, extra=8, descriptors=True, slices=4)
@case(CASES, "delta, descriptors", delta_linear, 40, 72, 24, torch.float16, extra=8, descriptors=True, slices=4)
@case(CASES, "prologue, sizes in units of 8", prologue_linear, 18, 72, 40, torch.float16, extra=8, slices=2)
@case(CASES, "delta, heads in two steps, in units of 8", delta_linear, 18, 72, 40, torch.float16, extra=8, slices=2)
@case(CASES, "prologue, ten rows of tiles", prologue_linear, 150, 72, 12, torch.float16)
@case(CASES, "delta, ten rows of tiles", delta_linear, 150, 72, 12, torch.float16)
@case(CASES, "prologue, bfloat16", prologue_linear, 18, 70, 20, torch.bfloat16, extra=5, bias=False)
@case(CASES, "delta, bfloat16", delta_linear, 18, 70, 20, torch.bfloat16, extra=5, bias=False)
def _linear(
    watch: Watch,
    form: Form,
    T: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    extra: int = 0,
    slices: int = 1,
    block: int = 16,
    descriptors: bool = False,
    bias: bool = True,
    stride: int = 0,
) -> None:
    z = far_rows(T, H * D, dtype, stride) if stride else rows(T, H * D, dtype, extra)
    weight, c = rows(N, H * D, dtype, 2 * extra, seed=4), vector(N, seed=5) if bias else None
    a = values(len(LISTED), D, size=0.25)
    y = form(z, weight, c, a, LISTED, D, tile=_tile(slices, block), descriptors=descriptors)
    check(y, _by(torch.float64, z, weight, c, a), _by(dtype, z, weight, c, a))
    _read_per_tile(watch, T, N, D, -(-T // block), descriptors)


def _read_per_tile(watch: Watch, T: int, N: int, D: int, down: int, descriptors: bool) -> None:
    """z was read once for each column of tiles, weight for each of the `down` rows; the listed heads once more."""
    launch = watch.launches[-1]
    again = torch.zeros(H * D, dtype=torch.int32)
    if launch.kernel.startswith("_delta"):
        again[(LISTED[:, None] * D + torch.arange(D)).reshape(-1)] = 1
    for name, n, times in (("z", T, -(-N // 64)), ("weight", N, down)):
        read = torch.from_numpy(launch.regions[name].reads).view(n, -1)
        expected = (times * (1 + again)).expand_as(read)
        # a descriptor ends with the tensor, not with the head: it reads into the next
        assert torch.equal(read, expected) or (descriptors and (read >= expected).all()), name


@case(CASES, "delta, every way to round to bfloat16", delta_linear)
@case(CASES, "prologue, every way to round to bfloat16", prologue_linear)
def _rounding(_: Watch, form: Form) -> None:
    D, c = 16, between(512)
    z, weight = (torch.zeros(n, H * D, dtype=torch.bfloat16) for n in (3, 512))
    y = form(z, weight, c, values(len(LISTED), D), LISTED, D, tile=_tile(2))
    assert torch.equal(y, c.to(torch.bfloat16).expand(3, -1))


@case(CASES, "delta, no heads", delta_linear)
@case(CASES, "prologue, no heads", prologue_linear)
def _nothing(_: Watch, form: Form) -> None:
    D, none = 24, heads()
    z, weight = rows(9, H * D, torch.float32), rows(13, H * D, torch.float32, seed=4)
    y = form(z, weight, None, values(0, D), none, D, tile=_tile(1))
    check(y, z.double() @ weight.double().T, z @ weight.T)


@case(CASES, "delta, descriptors, an infinity in the head after a listed one")
def _infinity(_: Watch) -> None:
    D = 24
    z, weight = rows(40, H * D, torch.float16), rows(72, H * D, torch.float16, seed=4)
    z[0, 2 * D] = float("inf")
    y = delta_linear(z, weight, None, values(len(LISTED), D), LISTED, D, tile=_tile(1), descriptors=True)
    # no NaN: what a tile has of the next head is left out, not multiplied by zero
    assert torch.equal(y[0], weight[:, 2 * D].sign() * float("inf")) and y[1:].isfinite().all()


@case(CASES, "delta, small scales in bfloat16")
def _small(_: Watch) -> None:
    D = 32
    z, weight = rows(32, H * D, torch.bfloat16), rows(64, H * D, torch.bfloat16, seed=4)
    a = 1e-4 * torch.sign(values(1, D))
    # the plain product of two heads cancels: what is left is the delta, before it is added to anything large
    z[:, 3 * D : 4 * D], weight[:, 3 * D : 4 * D] = z[:, 2 * D : 3 * D], -weight[:, 2 * D : 3 * D]
    weight[:, : 2 * D], weight[:, 4 * D :] = 0, 0
    exact = (z[:, 2 * D : 3 * D].double() * a.double()) @ weight[:, 2 * D : 3 * D].double().T
    y = delta_linear(z, weight, None, a, heads(2), D, tile=_tile(1)).double()
    gain = (y * exact).sum() / (exact**2).sum()
    assert abs(gain - 1) < 0.01, f"gain {gain:.3f}"
