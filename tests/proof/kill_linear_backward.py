"""Cases of the backward family: dY W with dz, da and dv taken from its accumulator."""

from __future__ import annotations

import itertools

import torch
import triton.language as tl

from lofit_kernels.error_bound import orders
from lofit_kernels.gpu import matmul
from lofit_kernels.gpu.linear_backward import affine_linear_bwd
from lofit_kernels.gpu.tiles import Tile
from tests.accuracy_rule import check
from tests.proof.kernel_inputs import Case, between, case, columns, far_rows, full, heads, rows, unlisted, values
from tests.proof.watch import Watch

CASES: list[Case] = []
H = 5
# the widest rows that are read where they are
NEAR = 2**23 - 8
# scaled only: 1; shifted only: 2; neither: 3; both: 0 and 4, which is the first of both lists
SCALED, SHIFTED = heads(4, 0, 1), heads(4, 2, 0)
NEEDS = [needs for needs in itertools.product([True, False], repeat=3) if any(needs)]
Needs = tuple[bool, bool, bool]


def _tile(slices: int, block: int) -> Tile:
    """`block` rows; smaller than any of the table, and no two sizes alike."""
    return Tile(4, 2, {"BLOCK_T": block, "BLOCK_K": 32, "BLOCK_N": 64, "SLICES": slices})


def _by(dtype: torch.dtype, grad: torch.Tensor, weight: torch.Tensor, z: torch.Tensor, a: torch.Tensor):
    """dz, da, dv with every step in `dtype`."""
    D = a.shape[1]
    G = grad.to(dtype).contiguous() @ weight.to(dtype).contiguous()
    da = (G * z.to(dtype)).sum(0)[columns(SCALED, D)].view(-1, D)
    dz = (1 + full(a, SCALED, H, torch.promote_types(dtype, torch.float32))) * G
    return dz.to(dtype), da, G.sum(0)[columns(SHIFTED, D)].view(-1, D)


def _eager(dtype: torch.dtype, grad: torch.Tensor, weight: torch.Tensor, z: torch.Tensor, a: torch.Tensor):
    """dz in `dtype`; da and dv, kept in float32, in several orders of their float32 sums."""
    by_order = [_by(torch.float32, grad[t][:, n], weight[n], z[t], a)[1:] for t, n in orders(*grad.shape)]
    return ([_by(dtype, grad, weight, z, a)[0]], *zip(*by_order, strict=True))


@case(CASES, "every way to round to bfloat16")
def _rounding(_: Watch) -> None:
    # the sums of two rows are exact, what they round to is not
    exact, weight = between(320), torch.empty(2, 320, dtype=torch.bfloat16)
    weight[0] = (exact * 128).floor() / 128
    weight[1] = exact - weight[0]
    dz = affine_linear_bwd(torch.ones(3, 2, dtype=torch.bfloat16), weight, *[None] * 4, 64, (True, False, False))[0]
    assert torch.equal(dz, exact.to(torch.bfloat16).expand(3, -1))


@case(CASES, "both sums in one reduction, as it is compiled")
def _reduction(_: Watch) -> None:
    D = 4
    grad, z, weight = (
        rows(*size, torch.float32, seed=seed) for size, seed in (((5, 6), 3), ((5, H * D), 5), ((6, H * D), 4))
    )
    a, before = values(len(SCALED), D), matmul.INTERPRET
    exact, by_torch = _by(torch.float64, grad, weight, z, a), _eager(torch.float32, grad, weight, z, a)
    matmul.INTERPRET = tl.constexpr(False)
    try:
        got = affine_linear_bwd(grad, weight, z, a, SCALED, SHIFTED, D, tile=_tile(1, 16))
    finally:
        matmul.INTERPRET = before
    for x, expected, eager in zip(got, exact, by_torch, strict=True):
        check(x, expected, *eager)


@case(CASES, "rows 2^30 elements apart", 3, 12, 16, torch.float16, NEEDS[:1], stride=2**30)
@case(CASES, "the last row 2^31 elements away", 390, 12, 16, torch.float16, NEEDS[:1], block=128, stride=NEAR)
@case(CASES, "no dz", 18, 70, 40, torch.float32, [n for n in NEEDS if not n[0]], extra=3)
@case(CASES, "descriptors, no dz", 40, 72, 40, torch.float16, [n for n in NEEDS if not n[0]], 8, descriptors=True)
@case(CASES, "descriptors", 40, 72, 24, torch.float16, NEEDS[:1], 8, slices=2, descriptors=True)
@case(CASES, "ten rows of tiles", 150, 12, 12, torch.float16, NEEDS[:1])
@case(CASES, "slices wider than heads", 18, 20, 6, torch.float32, NEEDS[:1], extra=3)
@case(CASES, "four slices", 18, 16, 16, torch.float16, NEEDS[:1], slices=4)
@case(CASES, "some gradients", 18, 20, 20, torch.float32, [n for n in NEEDS[1:] if n[0]], extra=3)
@case(CASES, "bfloat16", 18, 70, 20, torch.bfloat16, NEEDS[:1], 5, slices=2)
def _bwd(
    watch: Watch,
    T: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    subsets: list[Needs],
    extra: int = 0,
    slices: int = 1,
    block: int = 16,
    descriptors: bool = False,
    stride: int = 0,
) -> None:
    K = H * D
    grad, z = rows(T, N, dtype, extra, seed=3), rows(T, K, dtype, 2 * extra, seed=5)
    if stride:
        grad, z = far_rows(T, N, dtype, stride, seed=3), far_rows(T, K, dtype, stride, seed=5)
    weight, a = rows(N, K, dtype, 3 * extra, seed=4), values(len(SCALED), D)
    exact, eager = _by(torch.float64, grad, weight, z, a), _eager(dtype, grad, weight, z, a)
    if stride < 2**30:
        watch.forbid(z, columns(unlisted(H, SCALED), D))
    for needs in subsets:
        swept = [listed for listed, needed in zip((SCALED, SHIFTED), needs[1:], strict=True) if needed]
        a_heads, v_heads = (SCALED if needs[0] or needs[1] else None), (SHIFTED if needs[2] else None)
        args = (grad, weight, z if needs[1] else None, a if needs[0] else None, a_heads, v_heads, D, needs)
        got = affine_linear_bwd(*args, tile=_tile(slices, block), descriptors=descriptors)
        for name, x, expected, by_torch, needed in zip(("dz", "da", "dv"), got, exact, eager, needs, strict=True):
            assert (x is not None) == needed, name
            if needed:
                assert x.dtype == (dtype if name == "dz" else torch.float32), name
                check(x, expected, *by_torch)
        _read_once(watch, T, D, needs, swept, 0 if descriptors else -(-T // block))


def _read_once(watch: Watch, T: int, D: int, needs: Needs, swept: list[torch.Tensor], down: int) -> None:
    """z was read once on the scaled heads; weight once for each of `down` rows of tiles, without dz listed heads."""
    launch = watch.launches[-2 if needs[1] or needs[2] else -1]
    if needs[1]:
        read = torch.from_numpy(launch.regions["z"].reads).view(T, -1)
        assert (read[:, columns(SCALED, D)] == 1).all() and read.sum() == T * len(SCALED) * D
    if down:
        used = columns(torch.arange(H) if needs[0] else torch.cat(swept).unique(), D)
        expected = torch.zeros(H * D, dtype=torch.int32)
        expected[used] = down
        # a head in both lists costs nothing the second time
        tiles = -(-H * D // 32) if needs[0] else len(torch.cat(swept).unique()) * -(-D // 32)
        assert (launch.regions["grad"].reads == tiles).all(), "grad was read for columns that nothing depends on"
        read = torch.from_numpy(launch.regions["weight"].reads).view(-1, H * D)
        assert torch.equal(read, expected.expand_as(read)), "weight was read more or less often than needed"
