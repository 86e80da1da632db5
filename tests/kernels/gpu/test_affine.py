"""The elementwise pass, its delta form and its backward, against closed forms in float64."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from lofit_kernels.error_bound import orders
from lofit_kernels.gpu.affine import affine_bwd, affine_delta_fwd, affine_fwd
from tests.ordinary_sample import crossed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = {"none": [], "one": [2], "some": [0, 3], "others": [1, 2], "all": [0, 1, 2, 3]}
H = 4


def parameters(names, D, device, seed=1):
    heads = torch.tensor(HEADS[names], dtype=torch.int64, device=device)
    values = torch.randn(len(heads), D, generator=torch.Generator().manual_seed(seed)).to(device)
    return values, heads


def on_all_heads(values, heads, D, dtype):
    full = torch.zeros(H, D, dtype=dtype, device=values.device)
    full[heads] = values.to(dtype)
    return full.reshape(-1)


def columns(heads, D):
    return (heads[:, None] * D + torch.arange(D, device=heads.device)).reshape(-1)


def forward_in(dtype, z, a, a_heads, v, v_heads, D):
    return (1 + on_all_heads(a, a_heads, D, dtype)) * z.to(dtype) + on_all_heads(v, v_heads, D, dtype)


def backward_in(dtype, G, z, a, a_heads, v_heads, D):
    """dz, da, dv with every step in `dtype`."""
    G, z = G.to(dtype), z.to(dtype)
    dz = (1 + on_all_heads(a, a_heads, D, dtype)) * G
    da = (G * z).sum(0)[columns(a_heads, D)].view(-1, D)
    return dz, da, G.sum(0)[columns(v_heads, D)].view(-1, D)


def bitwise_equal(x, y):
    return (x is None and y is None) or torch.equal(x.view(torch.uint8), y.view(torch.uint8))


SHAPES = [
    (70, 64, "plain"),
    (5, 80, "padded"),
    (33, 96, "plain"),
    (19, 128, "plain"),
    (3, 256, "plain"),
    (17, 20, "transposed"),
]


# in the ordinary run each shape in one dtype; slow: each in every one
@pytest.mark.parametrize("T, D, kind, dtype", crossed(SHAPES, DTYPES))
def test_affine_fwd_matches_float64(device, poisoned, accurate, rows, dtype, T, D, kind):
    z = rows(T, H * D, dtype, kind)
    before = z.clone()
    a, a_heads = parameters("some", D, device)
    v, v_heads = parameters("others", D, device, seed=2)
    x = affine_fwd(z, a, a_heads, v, v_heads, D)
    assert x.dtype == dtype and x.is_contiguous()
    args = (z, a, a_heads, v, v_heads, D)
    accurate(x, forward_in(torch.float64, *args), forward_in(dtype, *args))
    assert torch.equal(z, before)
    assert bitwise_equal(x, affine_fwd(z, a, a_heads, v, v_heads, D))


@pytest.mark.parametrize("scaled, shifted", list(itertools.product(["none", "one", "all"], ["none", "some", "all"])))
def test_affine_fwd_rounds_once_on_any_heads(device, poisoned, rows, scaled, shifted):
    D = 24
    z = rows(9, H * D, torch.bfloat16)
    a, a_heads = parameters(scaled, D, device)
    v, v_heads = parameters(shifted, D, device, seed=2)
    x = affine_fwd(z, a, a_heads, v, v_heads, D)
    # float32 arithmetic, then the one rounding of PyTorch: ties to even
    once = forward_in(torch.float32, z, a, a_heads, v, v_heads, D).to(torch.bfloat16)
    assert torch.equal(x, once) if device.type == "cpu" else torch.allclose(x.float(), once.float(), rtol=2**-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_fwd_copies_heads_that_are_not_listed(device, rows, dtype):
    D = 16
    z = rows(6, H * D, dtype)
    z[0, ::2], z[1, 1], z[2, 2] = -0.0, float("inf"), float("nan")
    a, heads = parameters("one", D, device)
    x = affine_fwd(z, a, heads, a, heads, D)
    keep = torch.ones(H * D, dtype=torch.bool, device=device)
    keep[columns(heads, D)] = False
    same = x[:, keep].view(torch.uint8) == z[:, keep].view(torch.uint8)
    assert same.all() or torch.equal(x[:, keep].isnan(), z[:, keep].isnan())
    assert torch.equal(torch.signbit(x[0, keep]), torch.signbit(z[0, keep]))
    assert torch.equal(affine_fwd(z, None, None, None, None, D).nan_to_num(), z.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, D, names, kind", [(70, 64, "some", "plain"), (7, 20, "all", "padded"), (3, 80, "none", "plain")]
)
def test_affine_delta_fwd_matches_float64(device, poisoned, accurate, rows, dtype, T, D, names, kind):
    z = rows(T, H * D, dtype, kind)
    before = z.clone()
    a, heads = parameters(names, D, device)
    selected = z[:, columns(heads, D)].double()
    for size in (1.0, 1e-4, 1e-9):
        r = affine_delta_fwd(z, a * size, heads, D)
        assert r.dtype == dtype and r.shape == (T, len(heads) * D)
        x = affine_fwd(z, a * size, heads, None, None, D)[:, columns(heads, D)].double()
        exact = (a.double() * size).reshape(-1) * selected + (selected - x)
        if dtype == torch.float32:
            # what float32 loses is far below what it is computed with
            assert ((r - exact).abs() <= 2**-23 * (selected.abs() + x.abs())).all()
        else:
            accurate(r, exact, exact.to(dtype))
        # float16 has no number as small as the last
        if size == 1e-9 and dtype == torch.bfloat16:
            assert torch.equal(x, selected) and exact.any() == r.any() == bool(len(heads))
        assert bitwise_equal(r, affine_delta_fwd(z, a * size, heads, D))
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    "T, D, kind, inplace, dtype",
    crossed(
        [(70, 64, "plain"), (35, 80, "padded"), (17, 20, "transposed")], list(itertools.product([False, True], DTYPES))
    ),
)
def test_affine_bwd_matches_float64(device, poisoned, accurate, rows, dtype, inplace, T, D, kind):
    G, z = rows(T, H * D, dtype, kind, seed=3), rows(T, H * D, dtype, kind)
    a, a_heads = parameters("some", D, device)
    v_heads = parameters("all", D, device)[1][1:]
    before = G.clone(), z.clone()
    expected = backward_in(torch.float64, G, z, a, a_heads, v_heads, D)
    by_order = [backward_in(torch.float32, G[t], z[t], a, a_heads, v_heads, D)[1:] for (t,) in orders(T, device=device)]
    eager_da, eager_dv = zip(*by_order, strict=True)
    eager_dz = backward_in(dtype, G, z, a, a_heads, v_heads, D)[0]
    given = G.clone() if inplace else G
    dz, da, dv = affine_bwd(given, z, a, a_heads, v_heads, D, inplace=inplace)
    accurate(dz, expected[0], eager_dz)
    # parameter gradients are float32 whatever the model's dtype: held to float32 arithmetic
    accurate(da, expected[1], *eager_da)
    accurate(dv, expected[2], *eager_dv)
    assert da.dtype == dv.dtype == torch.float32 and dz.dtype == dtype
    assert torch.equal(G, before[0]) and torch.equal(z, before[1])
    if not inplace:
        again = affine_bwd(G, z, a, a_heads, v_heads, D)
        assert all(bitwise_equal(x, y) for x, y in zip((dz, da, dv), again, strict=True))


SUBSETS = list(itertools.product(itertools.product([True, False], repeat=3), [False, True]))


# in the ordinary run each subset, in place and not, on some of the heads; slow: on all
@pytest.mark.parametrize(
    "scaled, shifted, needs, inplace",
    crossed([("some", "others"), ("all", "one"), ("one", "all"), ("none", "none")], SUBSETS),
)
def test_affine_bwd_every_subset_of_needs(device, poisoned, rows, needs, inplace, scaled, shifted):
    T, D = 21, 16
    G, z = rows(T, H * D, torch.float32, seed=3), rows(T, H * D, torch.float32)
    a, a_heads = parameters(scaled, D, device)
    v_heads = parameters(shifted, D, device)[1]
    expected = backward_in(torch.float64, G, z, a, a_heads, v_heads, D)
    given = G.clone()
    got = affine_bwd(
        given,
        z if needs[1] else None,
        a if needs[0] else None,
        a_heads if needs[0] or needs[1] else None,
        v_heads if needs[2] else None,
        D,
        needs,
        inplace,
    )
    for x, reference, needed in zip(got, expected, needs, strict=True):
        assert (x is not None) == needed
        if needed:
            torch.testing.assert_close(x.double(), reference, rtol=1e-5, atol=1e-5)
    if not inplace:
        assert torch.equal(given, G)
        assert got[0] is None or got[0].untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
    elif needs[0]:
        assert got[0] is given
    else:
        assert torch.equal(given, G)


def test_affine_bwd_inplace_touches_only_the_listed_heads(device, rows):
    D = 16
    G, z = rows(19, H * D, torch.float32, seed=3), rows(19, H * D, torch.float32)
    a, a_heads = parameters("one", D, device)
    v_heads = parameters("others", D, device)[1]
    G[:, columns(torch.tensor([0, 3], device=device), D)] = float("nan")
    z[:, columns(torch.tensor([0, 1, 3], device=device), D)] = float("nan")
    kept = G[:, columns(torch.tensor([1], device=device), D)].clone()
    dz, da, dv = affine_bwd(G, z, a, a_heads, v_heads, D, inplace=True)
    assert da.isfinite().all() and dv.isfinite().all()
    assert torch.equal(dz[:, columns(torch.tensor([1], device=device), D)], kept)


def test_affine_bwd_many_chunks_and_an_expanded_gradient(device, poisoned, rows, monkeypatch):
    from lofit_kernels.gpu import launch

    D, T = 16, 75
    a, a_heads = parameters("some", D, device)
    v_heads = parameters("all", D, device)[1]
    z = rows(T, H * D, torch.float32)
    plain, expanded = rows(T, H * D, torch.float32, seed=3), rows(T, H * D, torch.float32, "expanded", seed=3)
    cases = ((1, plain, True), (8, plain, False), (8, expanded, True), (4096, expanded, False))
    for programs, G, inplace in cases:
        expected = backward_in(torch.float64, G, z, a, a_heads, v_heads, D)
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        before = G.clone()
        given = G.clone() if inplace and G.stride(0) else G
        got = affine_bwd(given, z, a, a_heads, v_heads, D, inplace=inplace)
        for x, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(x.double(), reference, rtol=1e-5, atol=1e-5)
        assert torch.equal(G, before)


def test_affine_float64_stays_float64(device, rows):
    D = 16
    G, z = rows(9, H * D, torch.float64, seed=3), rows(9, H * D, torch.float64)
    a, heads = parameters("some", D, device)
    x = affine_fwd(z, a, heads, a, heads, D)
    torch.testing.assert_close(x, forward_in(torch.float64, z, a, heads, a, heads, D), rtol=1e-15, atol=1e-15)
    expected = backward_in(torch.float64, G, z, a, heads, heads, D)
    for got, reference in zip(affine_bwd(G, z, a, heads, heads, D), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_without_rows(device, poisoned, rows, dtype):
    D = 16
    z = rows(0, H * D, dtype)
    a, heads = parameters("some", D, device)
    assert affine_fwd(z, a, heads, a, heads, D).shape == (0, H * D)
    assert affine_delta_fwd(z, a, heads, D).shape == (0, 2 * D)
    for inplace in (False, True):
        dz, da, dv = affine_bwd(z, z, a, heads, heads, D, inplace=inplace)
        assert dz.shape == z.shape
        assert torch.equal(da, torch.zeros(2, D, device=device)) and torch.equal(dv, da)


def test_affine_errors_name_what_was_got(device, rows):
    z = rows(2, 32, torch.float32)
    a, heads = parameters("some", 16, device)
    with pytest.raises(ValueError, match="head_dim 24 does not divide the 32 columns"):
        affine_fwd(z, a, heads, None, None, 24)
    with pytest.raises(ValueError, match="torch.int32"):
        affine_fwd(z.int(), a, heads, None, None, 16)
    with pytest.raises(ValueError, match="2 dimensions"):
        affine_fwd(z[0], a, heads, None, None, 16)
    with pytest.raises(ValueError, match="da needs"):
        affine_bwd(z, None, a, heads, None, 16, (False, True, False))
    with pytest.raises(ValueError, match="dv needs"):
        affine_bwd(z, z, a, heads, None, 16)


def test_affine_launch_counts(device, rows):
    from lofit_kernels.gpu.launch import recording

    D = 16
    z = rows(40, H * D, torch.float32)
    a, heads = parameters("some", D, device)

    def launches(*call, **options):
        with recording("sm_90") as recorded:
            call[0](*call[1:], **options)
        return len(recorded.launches)

    assert launches(affine_fwd, z, a, heads, a, heads, D) == 1
    assert launches(affine_delta_fwd, z, a, heads, D) == 1
    assert launches(affine_bwd, z, z, a, heads, heads, D) == 2
    assert launches(affine_bwd, z, z, a, heads, heads, D, (True, False, False)) == 1
    assert launches(affine_bwd, z, z, None, None, None, D, (True, False, False), inplace=True) == 0
