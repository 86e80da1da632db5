"""The backward GEMM with dz, da and dv taken from its accumulator, against closed forms in float64."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from lofit_kernels.error_bound import orders
from lofit_kernels.gpu.launch import recording
from lofit_kernels.gpu.linear_backward import affine_linear_bwd
from lofit_kernels.gpu.tiles import Tile
from tests.ordinary_sample import crossed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = {"none": [], "one": [2], "some": [0, 3], "others": [1, 2], "most": [1, 2, 3], "all": [0, 1, 2, 3]}
H = 4
# smaller than any tile of the table, so that toy shapes have several of them
TOY = Tile(4, 2, {"BLOCK_T": 32, "BLOCK_K": 64, "BLOCK_N": 32, "SLICES": 2})
NEEDS = [needs for needs in product([True, False], repeat=3) if any(needs)]


def parameters(names, D, device):
    heads = torch.tensor(HEADS[names], dtype=torch.int64, device=device)
    return torch.randn(len(heads), D, generator=torch.Generator().manual_seed(1)).to(device), heads


def columns(heads, D):
    return (heads[:, None] * D + torch.arange(D, device=heads.device)).reshape(-1)


def backward_in(dtype, grad, weight, z, a, a_heads, v_heads, D):
    """dz, da, dv with every step in `dtype`."""
    # contiguous: on CPU a bfloat16 product of rows with gaps reads the gaps
    G = grad.to(dtype).contiguous() @ weight.to(dtype).contiguous()
    gain = torch.ones(H, D, dtype=dtype, device=grad.device)
    gain[a_heads] += a.to(dtype)
    da = (G * z.to(dtype)).sum(0)[columns(a_heads, D)].view(-1, D)
    return gain.reshape(-1) * G, da, G.sum(0)[columns(v_heads, D)].view(-1, D)


def eager_in_orders(dtype, grad, weight, z, *rest):
    """dz in `dtype`; da and dv in several orders of their sums, in float32 whatever the model's dtype."""
    by_order = [
        backward_in(torch.float32, grad[t][:, n], weight[n], z[t], *rest)[1:]
        for t, n in orders(*grad.shape, device=grad.device)
    ]
    return ([backward_in(dtype, grad, weight, z, *rest)[0]], *zip(*by_order, strict=True))


def bitwise_equal(x, y):
    return (x is None and y is None) or torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def check(accurate, grad, weight, z, a, a_heads, v_heads, D, **options):
    args = (grad, weight, z, a, a_heads, v_heads, D)
    before = [x.clone() for x in (grad, weight, z, a)]
    got = affine_linear_bwd(*args, **options)
    dtype = grad.dtype
    expected = backward_in(torch.float64, *args)
    eager = eager_in_orders(dtype, *args)
    for name, x, exact, by_torch in zip(("dz", "da", "dv"), got, expected, eager, strict=True):
        assert x.dtype == (dtype if name == "dz" else torch.float32), name
        accurate(x, exact, *by_torch)
    assert all(torch.equal(x, old) for x, old in zip((grad, weight, z, a), before, strict=True))
    assert all(bitwise_equal(x, y) for x, y in zip(got, affine_linear_bwd(*args, **options), strict=True))
    return got


SHAPES = [
    (40, 72, 64, "some", "most", "plain"),
    (33, 40, 80, "most", "one", "plain"),
    (40, 33, 96, "one", "all", "padded"),
    (7, 100, 128, "all", "all", "plain"),
    (9, 64, 256, "one", "none", "padded"),
    (35, 50, 20, "all", "some", "transposed"),
    (45, 24, 12, "some", "others", "plain"),
    # last, where the ordinary run takes float32: in 16 bits the interpreter takes longest for it
    (300, 24, 20, "most", "some", "plain"),
]


# in the ordinary run each shape in one dtype; slow: each in every one
@pytest.mark.parametrize("dtype, T, N, D, scaled, shifted, kind", crossed(DTYPES, SHAPES))
def test_affine_linear_bwd_matches_float64(device, poisoned, accurate, rows, dtype, T, N, D, scaled, shifted, kind):
    grad, weight = rows(T, N, dtype, kind, seed=3), rows(N, H * D, dtype, kind, seed=4)
    z = rows(T, H * D, dtype, kind)
    (a, a_heads), v_heads = parameters(scaled, D, device), parameters(shifted, D, device)[1]
    check(accurate, grad, weight, z, a, a_heads, v_heads, D, tile=TOY, descriptors=False)


@pytest.mark.parametrize(
    "T, N, D, scaled, shifted, dtype",
    crossed(
        [
            (40, 72, 64, "some", "most"),
            (33, 40, 80, "most", "one"),
            (40, 48, 24, "all", "all"),
            (5, 16, 32, "none", "one"),
        ],
        DTYPES[1:],
    ),
)
def test_affine_linear_bwd_through_descriptors(device, poisoned, accurate, rows, dtype, T, N, D, scaled, shifted):
    # rows of wider tensors: what lies beyond them must not be read
    grad, weight, z = rows(T, N + 8, dtype), rows(N, H * D + 8, dtype, seed=4), rows(T, H * D + 8, dtype, seed=5)
    for x in (grad, weight, z):
        x[:, -8:] = float("nan")
    grad, weight, z = grad[:, :N], weight[:, : H * D], z[:, : H * D]
    (a, a_heads), v_heads = parameters(scaled, D, device), parameters(shifted, D, device)[1]
    check(accurate, grad, weight, z, a, a_heads, v_heads, D, tile=TOY, descriptors=True)


NEEDY = [("some", "others", 16), ("all", "one", 48), ("one", "all", 16), ("some", "most", 40), ("none", "none", 16)]


# in the ordinary run each subset with and without descriptors, on some of the heads; slow: on all
@pytest.mark.parametrize("scaled, shifted, D, needs, descriptors", crossed(NEEDY, list(product(NEEDS, [False, True]))))
def test_affine_linear_bwd_every_subset_of_needs(device, poisoned, rows, descriptors, needs, scaled, shifted, D):
    dtype, T, N = torch.float16 if descriptors else torch.float32, 41, 40
    grad, weight, z = rows(T, N, dtype, seed=3), rows(N, H * D, dtype, seed=4), rows(T, H * D, dtype)
    (a, a_heads), v_heads = parameters(scaled, D, device), parameters(shifted, D, device)[1]
    expected = backward_in(torch.float64, grad, weight, z, a, a_heads, v_heads, D)
    got = affine_linear_bwd(
        grad,
        weight,
        z if needs[1] else None,
        a if needs[0] else None,
        a_heads if needs[0] or needs[1] else None,
        v_heads if needs[2] else None,
        D,
        needs,
        tile=TOY,
        descriptors=descriptors,
    )
    for x, exact, needed in zip(got, expected, needs, strict=True):
        assert (x is not None) == needed
        if needed:
            rounding = torch.finfo(x.dtype).eps * 2 if x.dtype == torch.float16 else 1e-5
            torch.testing.assert_close(x.double(), exact, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("D, descriptors, slices", crossed([32, 8, 40], list(product([False, True], [1, 4]))))
def test_affine_linear_bwd_epilogue_in_slices(device, poisoned, accurate, rows, descriptors, slices, D):
    # slices narrower and wider than a head, and across the border of two or more
    tile = Tile(4, 2, {**TOY.blocks, "SLICES": slices})
    grad, weight = rows(40, 48, torch.float16, seed=3), rows(48, H * D, torch.float16, seed=4)
    z = rows(40, H * D, torch.float16)
    (a, a_heads), v_heads = parameters("most", D, device), parameters("some", D, device)[1]
    check(accurate, grad, weight, z, a, a_heads, v_heads, D, tile=tile, descriptors=descriptors)


@pytest.mark.parametrize(
    "T, N, D, dtype", [(17, 576, 64, torch.bfloat16), pytest.param(150, 72, 80, torch.float16, marks=pytest.mark.slow)]
)
def test_affine_linear_bwd_with_the_tiles_of_the_table(device, poisoned, accurate, rows, T, N, D, dtype):
    grad, weight, z = rows(T, N, dtype, seed=3), rows(N, H * D, dtype, seed=4), rows(T, H * D, dtype)
    (a, a_heads), v_heads = parameters("some", D, device), parameters("most", D, device)[1]
    for descriptors in (None, False):
        check(accurate, grad, weight, z, a, a_heads, v_heads, D, descriptors=descriptors)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("D", [16, 40])
def test_affine_linear_bwd_reads_only_what_is_listed(device, poisoned, rows, descriptors, D):
    grad, weight, z = (rows(n, m, torch.float16, seed=n) for n, m in ((40, 48), (48, H * D), (40, H * D)))
    (a, a_heads), v_heads = parameters("one", D, device), parameters("others", D, device)[1]
    options = {"tile": TOY, "descriptors": descriptors}
    unlisted = columns(torch.tensor([0, 1, 3], device=device), D)
    _, da, dv = affine_linear_bwd(grad, weight, z, a, a_heads, v_heads, D, **options)
    z[:, unlisted] = float("nan")
    dz, same_da, same_dv = affine_linear_bwd(grad, weight, z, a, a_heads, v_heads, D, **options)
    assert dz.isfinite().all() and torch.equal(da, same_da) and torch.equal(dv, same_dv)
    weight[:, columns(torch.tensor([0, 3], device=device), D)] = float("nan")
    _, same_da, same_dv = affine_linear_bwd(grad, weight, z, None, a_heads, v_heads, D, (False, True, True), **options)
    torch.testing.assert_close(same_da, da)
    torch.testing.assert_close(same_dv, dv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_affine_linear_bwd_without_rows(device, poisoned, rows, dtype, needs):
    D = 16
    a, heads = parameters("some", D, device)
    got = affine_linear_bwd(
        rows(0, 24, dtype), rows(24, H * D, dtype), rows(0, H * D, dtype), a, heads, heads, D, needs
    )
    for x, needed, empty in zip(got, needs, (True, False, False), strict=True):
        assert (x is not None) == needed
        if needed:
            assert x.shape == (0, H * D) if empty else torch.equal(x, torch.zeros(2, D, device=device))


def test_affine_linear_bwd_of_an_expanded_gradient(device, rows):
    # what y.sum().backward() sends: every stride is 0
    D = 16
    grad = torch.ones((), dtype=torch.float16, device=device).expand(40, 24)
    weight = rows(24, H * D, torch.float16)
    heads = parameters("all", D, device)[1]
    dv = affine_linear_bwd(grad, weight, None, None, None, heads, D, (False, False, True), tile=TOY)[2]
    torch.testing.assert_close(dv.view(-1), 40 * weight.float().sum(0), rtol=1e-5, atol=1e-4)


def test_affine_linear_bwd_errors_name_what_was_got(device, rows):
    grad, weight, z = rows(3, 8, torch.float16), rows(8, 64, torch.float16), rows(3, 64, torch.float16)
    a, heads = parameters("some", 16, device)
    with pytest.raises(ValueError, match="grad has 7 columns and weight 8 rows"):
        affine_linear_bwd(grad[:, :7], weight, z, a, heads, heads, 16)
    with pytest.raises(ValueError, match="head_dim 24 does not divide the 64 columns"):
        affine_linear_bwd(grad, weight, z, a, heads, heads, 24)
    with pytest.raises(ValueError, match=r"da needs scale_heads and a z of shape \(3, 64\) and of torch.float16"):
        affine_linear_bwd(grad, weight, z.float(), a, heads, heads, 16)
    with pytest.raises(ValueError, match="dv needs"):
        affine_linear_bwd(grad, weight, z, a, heads, None, 16)
    with pytest.raises(ValueError, match="got torch.float64"):
        affine_linear_bwd(grad.double(), weight.double(), None, a, heads, None, 16, (True, False, False))
    with pytest.raises(ValueError, match="2 dimensions"):
        affine_linear_bwd(grad[0], weight, z, a, heads, heads, 16)


def test_affine_linear_bwd_launches(device, rows):
    D = 16
    grad, weight, z = rows(40, 24, torch.float16), rows(24, H * D, torch.float16), rows(40, H * D, torch.float16)
    a, heads = parameters("some", D, device)

    def launches(needs, a_heads=heads):
        with recording("sm_90") as recorded:
            affine_linear_bwd(grad, weight, z, a, a_heads, heads, D, needs)
        return len(recorded.launches)

    # one program sums all of so few rows: two sums need a second launch, which takes them apart
    assert launches((True, True, True)) == 2
    assert launches((False, True, False)) == 1
    assert launches((True, False, False)) == 1
    assert launches((False, True, False), heads[:0]) == 0
