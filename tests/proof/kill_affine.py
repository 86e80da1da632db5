"""Cases of the affine family: the elementwise pass, its delta form, and their backward."""

from __future__ import annotations

import itertools

import torch

from lofit_kernels import aten
from lofit_kernels.error_bound import orders
from lofit_kernels.gpu.affine import affine_bwd, affine_delta_fwd, affine_fwd
from tests.accuracy_rule import check
from tests.proof.kernel_inputs import (
    Case,
    between,
    case,
    columns,
    far_rows,
    full,
    heads,
    programs,
    rows,
    unlisted,
    values,
)
from tests.proof.watch import Watch

CASES: list[Case] = []
H = 5
# scaled only: 1; shifted only: 2; neither: 3; both: 0 and 4, which is the first of both lists
SCALED, SHIFTED = heads(4, 0, 1), heads(4, 2, 0)
NEEDS = [needs for needs in itertools.product([True, False], repeat=3) if any(needs)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@case(CASES, "forward, rows 2^31 elements apart", 3, 16, torch.float16, stride=2**31)
@case(CASES, "forward, rows 2^30 elements apart", 3, 16, torch.float16, stride=2**30)
@case(CASES, "forward, float64", 5, 20, torch.float64)
@case(CASES, "forward, float16", 66, 24, torch.float16, extra=8)
@case(CASES, "forward, float32", 33, 70, torch.float32, extra=3)
@case(CASES, "forward, bfloat16", 67, 20, torch.bfloat16, extra=5)
def _fwd(watch: Watch, T: int, D: int, dtype: torch.dtype, extra: int = 0, stride: int = 0) -> None:
    z = far_rows(T, H * D, dtype, stride) if stride else rows(T, H * D, dtype, extra)
    # -0 + 0 would be +0: heads without an offset are left alone
    z[0] = -0.0
    a, v = values(len(SCALED), D, seed=1), values(len(SHIFTED), D, seed=2)
    for with_a, with_v in ((True, True), (True, False), (False, True)):

        def by(wide: torch.dtype, with_a: bool = with_a, with_v: bool = with_v) -> torch.Tensor:
            x = (1 + full(a, SCALED, H, wide)) * z.to(wide) if with_a else z.to(wide)
            return x + full(v, SHIFTED, H, wide) if with_v else x

        options = (a, SCALED) if with_a else (None, None), (v, SHIFTED) if with_v else (None, None)
        x = affine_fwd(z, *options[0], *options[1], D)
        check(x, by(torch.float64), by(dtype))
        # every step in the accumulator's dtype, then one rounding, to nearest even
        once = by(_wide(dtype)).to(dtype)
        assert torch.equal(x, once) or dtype == torch.float64
        assert torch.signbit(x[0, columns(unlisted(H, SCALED, SHIFTED), D)]).all()
        assert (watch.launches[-1].regions["z"].reads == 1).all()


@case(CASES, "forward dithered, float32", 5, 20, torch.float32)
@case(CASES, "forward dithered, float16", 66, 24, torch.float16, extra=8)
@case(CASES, "forward dithered, bfloat16", 67, 20, torch.bfloat16, extra=5)
def _dithered(_: Watch, T: int, D: int, dtype: torch.dtype, extra: int = 0) -> None:
    z = rows(T, H * D, dtype, extra)
    z[0], z[1, 0], z[2, 0] = -0.0, float("nan"), float("-inf")
    a, v = values(len(SCALED), D, seed=1), values(len(SHIFTED), D, seed=2)
    for vectors in ((a, SCALED, v, SHIFTED), (a, SCALED, None, None), (None, None, v, SHIFTED)):
        x, twin = affine_fwd(z, *vectors, D, True), aten.affine_fwd(z, *vectors, D, True)
        # processors that multiply and add in one rounding are one unit of float32 away
        allowed = 2.0**-22 if dtype == torch.float32 else 0.0
        torch.testing.assert_close(x, twin, rtol=allowed, atol=allowed, equal_nan=True)


@case(CASES, "forward dithered, the ends of float16", torch.float16)
@case(CASES, "forward dithered, the ends of bfloat16", torch.bfloat16)
def _dithered_ends(_: Watch, dtype: torch.dtype) -> None:
    largest = torch.tensor(torch.finfo(dtype).max)
    gap = (largest - largest.to(dtype).nextafter(torch.zeros((), dtype=dtype))).float()
    v, every = gap * torch.linspace(-0.99, 0.99, H * 16).view(H, 16), torch.arange(H)
    for z in (largest.to(dtype).expand(40, H * 16), -largest.to(dtype).expand(40, H * 16)):
        x = affine_fwd(z, None, None, v, every, 16, True)
        assert torch.equal(x, aten.affine_fwd(z, None, None, v, every, 16, True))
        assert torch.equal(x.isinf(), (z + v.flatten()).to(dtype).isinf())


@case(CASES, "forward, every way to round to bfloat16")
def _rounding(_: Watch) -> None:
    v = torch.empty(H, 128)
    v[:4] = between(512).view(4, 128)
    # a NaN that plain integer rounding would carry over into a zero
    v[4] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)
    x = affine_fwd(torch.zeros(1, H * 128, dtype=torch.bfloat16), None, None, v, torch.arange(H), 128)
    assert torch.equal(x.view(H, 128)[:4], v[:4].to(torch.bfloat16))
    assert x.view(H, 128)[4].isnan().all()


@case(CASES, "delta, rows 2^31 elements apart", 3, 16, torch.float16, stride=2**31)
@case(CASES, "delta, rows 2^30 elements apart", 3, 16, torch.float16, stride=2**30)
@case(CASES, "delta, columns beyond 16 bits", 2, 8192, torch.float32)
@case(CASES, "delta, float64", 5, 20, torch.float64)
@case(CASES, "delta, float16", 66, 24, torch.float16, extra=8)
@case(CASES, "delta, bfloat16", 67, 20, torch.bfloat16, extra=5)
def _delta(watch: Watch, T: int, D: int, dtype: torch.dtype, extra: int = 0, stride: int = 0) -> None:
    listed = heads(2, 0, 4)
    z = far_rows(T, H * D, dtype, stride) if stride else rows(T, H * D, dtype, extra)
    a, taken = values(len(listed), D), z[:, columns(listed, D)]
    if stride < 2**31:
        watch.forbid(z, columns(unlisted(H, listed), D))
    r = affine_delta_fwd(z, a, listed, D)
    wide, flat = taken.to(_wide(dtype)), a.reshape(-1).to(_wide(dtype))
    assert torch.equal(r, (wide * flat + (wide - (wide * (1 + flat)).to(dtype))).to(dtype))
    read = watch.launches[-1].regions["z"].reads.reshape(T, -1)
    assert (read[:, columns(listed, D)] == 1).all() and read.sum() == T * len(listed) * D


@case(CASES, "backward, rows 2^31 elements apart", 3, 16, torch.float16, NEEDS[:1], stride=2**31)
@case(CASES, "backward, rows 2^30 elements apart", 3, 16, torch.float16, NEEDS[:1], stride=2**30)
@case(CASES, "backward, float64", 5, 20, torch.float64, NEEDS[:1])
@case(CASES, "backward, several blocks a program", 100, 16, torch.float16, NEEDS[:1], number=6)
@case(CASES, "backward, one block a program", 40, 24, torch.float32, NEEDS[:1], extra=8)
@case(CASES, "backward, some gradients", 37, 16, torch.float32, NEEDS[1:])
@case(CASES, "backward, bfloat16", 37, 20, torch.bfloat16, NEEDS[:1], extra=5)
def _bwd(
    watch: Watch,
    T: int,
    D: int,
    dtype: torch.dtype,
    subsets: list[tuple[bool, bool, bool]],
    extra: int = 0,
    number: int = 2048,
    stride: int = 0,
) -> None:
    K = H * D
    G, z = rows(T, K, dtype, extra, seed=3), rows(T, K, dtype, 2 * extra, seed=4)
    if stride:
        G, z = far_rows(T, K, dtype, stride, seed=3), far_rows(T, K, dtype, stride + 8, seed=4)
    a = values(len(SCALED), D)
    exact = _gradients(G.double(), z.double(), a)
    by_order = [_gradients(G[t].to(_wide(dtype)), z[t].to(_wide(dtype)), a) for (t,) in orders(T)]
    wide = by_order[0]
    if stride < 2**31:
        watch.forbid(z, columns(unlisted(H, SCALED), D))
    for needs, inplace in itertools.product(subsets, (False, True)):
        given = G.clone() if inplace else G
        swept = (SCALED if needs[0] or needs[1] else heads(), SHIFTED if needs[2] else heads())
        if inplace:
            watch.forbid(given, columns(unlisted(H, *swept), D))
        with programs(number):
            got = affine_bwd(given, z, a, SCALED, SHIFTED, D, needs, inplace)
        check_gradients(got, exact, by_order, needs, dtype)
        # dz is rounded once, to nearest even
        assert not needs[0] or torch.equal(got[0], wide[0].to(dtype))
        if inplace:
            same = columns(unlisted(H, SCALED), D)
            assert torch.equal(given[:, same], G[:, same])
        launched = watch.launches[-2 if needs[1] or needs[2] else -1].regions
        # nothing is read twice: a head in both lists is swept once
        assert launched["grad"].reads.max() == 1
        assert not needs[1] or launched["z"].reads.sum() == T * len(SCALED) * D


def _gradients(G: torch.Tensor, z: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, ...]:
    D, wide = a.shape[1], G.dtype
    dz = (1 + full(a, SCALED, H, wide)) * G
    return dz, (G * z).sum(0)[columns(SCALED, D)].view(-1, D), G.sum(0)[columns(SHIFTED, D)].view(-1, D)


def check_gradients(
    got: tuple[torch.Tensor | None, ...],
    exact: tuple[torch.Tensor, ...],
    by_order: list[tuple[torch.Tensor, ...]],
    needs: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> None:
    """dz within one rounding of the exact one; da and dv, kept in float32, held to float32 sums in several orders."""
    dz, *sums = zip(*by_order, strict=True)
    eager = ([dz[0].to(dtype)], *sums)
    for name, x, expected, by_torch, needed in zip(("dz", "da", "dv"), got, exact, eager, needs, strict=True):
        assert (x is not None) == needed, name
        if needed:
            assert x.dtype == (dtype if name == "dz" else _wide(dtype)), name
            check(x, expected, *by_torch)
