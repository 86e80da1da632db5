"""Rounding by a fixed pattern: kernel and twin bit for bit, what it may change, and what acts that is too small."""

from itertools import product

import pytest
import torch

from benchmarks.proof.dead_zone import gain, inputs
from benchmarks.proof.dead_zone import rows as vectors_of
from lofit_kernels import aten, head_affine_linear, head_index, reference
from lofit_kernels.gpu.launch import recording
from tests.kernels.op_inputs import FLOATS, doubled, eager, eager_in_orders, make
from tests.ordinary_sample import crossed

affine = pytest.importorskip("lofit_kernels.gpu.affine")

DTYPES = [torch.bfloat16, torch.float16]
H, D = 4, 20
BACKENDS = ("aten", "triton")


def vectors(device, scaled=(0, 2), shifted=(2, 3), size=1e-2):
    generator = torch.Generator().manual_seed(1)
    found = []
    for heads in (scaled, shifted):
        values = size * torch.randn(len(heads), D, generator=generator)
        found += [values.to(device), head_index(list(heads), H, device)]
    return found


def assert_agree(x, twin):
    """Equal. Compiled, the kernel multiplies and adds in one operation, so that a rounding may be decided otherwise."""
    assert (x != twin).float().mean() <= (1e-3 if x.is_cuda else 0)


@pytest.mark.parametrize("kind, dtype", crossed(["plain", "padded", "transposed"], DTYPES))
def test_dither_is_its_twin(device, poisoned, rows, dtype, kind):
    z = rows(37, H * D, dtype, kind)
    z[0, 0], z[1, 1], z[2, 2], z[3, 3] = float("inf"), float("-inf"), -0.0, 1e-7
    a, a_heads, v, v_heads = vectors(device)
    for given in ((a, a_heads, v, v_heads), (a, a_heads, None, None), (None, None, v, v_heads)):
        x = affine.affine_fwd(z, *given, D, True)
        assert_agree(x, aten.affine_fwd(z, *given, D, True))
        assert x[0, 0] == float("inf")
    z[4, 4] = float("nan")
    for on in (affine, aten):
        x = on.affine_fwd(z, *vectors(device), D, True)
        assert x.isnan().sum() == 1 and x[4, 4].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dither_leaves_alone_what_the_dtype_holds(device, rows, dtype, backend):
    on = affine if backend == "triton" else aten
    z = rows(50, H * D, dtype)
    a, a_heads, v, v_heads = vectors(device)
    x = on.affine_fwd(z, torch.zeros_like(a), a_heads, torch.zeros_like(v), v_heads, D, True)
    assert torch.equal(x, z)
    # the heads that are not listed, whatever the others get
    x = on.affine_fwd(z, a, a_heads, v, v_heads, D, True)
    assert torch.equal(x[:, D : 2 * D], z[:, D : 2 * D])
    assert not torch.equal(x[:, :D], z[:, :D])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dither_goes_to_one_of_the_two_neighbours(device, rows, dtype):
    z = rows(64, H * D, dtype)
    given = vectors(device)
    exact = aten.affine_fwd(z.double(), *(x.double() if x.is_floating_point() else x for x in given), D)
    x = affine.affine_fwd(z, *given, D, True).double()
    spacing = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    # float32 itself rounds before
    assert ((x - exact).abs() < spacing * (1 + 1e-3)).all()
    nearest = affine.affine_fwd(z, *given, D)
    assert not torch.equal(x, nearest.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dither_makes_infinity_of_what_is_it_rounded_to_the_nearest(device, dtype, backend):
    on = affine if backend == "triton" else aten
    largest = torch.finfo(dtype).max
    gap = largest - torch.tensor(largest).to(dtype).nextafter(torch.tensor(0.0, dtype=dtype)).item()
    every = head_index(list(range(H)), H, device)
    for sign in (1, -1):
        z = torch.full((60, H * D), sign * largest, dtype=dtype, device=device)
        for share, infinite in ((0.2, False), (0.499, False), (0.5, True), (0.9, True)):
            x = on.affine_fwd(z, None, None, torch.full((H, D), sign * share * gap, device=device), every, D, True)
            assert x.isinf().all() if infinite else torch.equal(x, z)
        x = on.affine_fwd(z, None, None, torch.full((H, D), -sign * 0.3 * gap, device=device), every, D, True)
        assert set(x.unique().tolist()) == {sign * largest, sign * (largest - gap)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_dither_of_float16s_subnormals_is_the_nearest(device, backend):
    on = affine if backend == "triton" else aten
    z = torch.arange(1, 1 + H * D, device=device).to(torch.int16).view(torch.float16).expand(30, H * D)
    v = 2.0**-24 * torch.tensor([0.3, 0.45, -0.3, -0.45], device=device).repeat(H * D // 4).view(H, D)
    assert torch.equal(on.affine_fwd(z, None, None, v, head_index(list(range(H)), H, device), D, True), z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dither_of_a_token_depends_on_that_token_alone(device, rows, dtype):
    z, given = rows(40, H * D, dtype), vectors(device)
    x = affine.affine_fwd(z, *given, D, True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).to(device)
    assert torch.equal(affine.affine_fwd(z[order], *given, D, True), x[order])
    assert torch.equal(affine.affine_fwd(z[7:9], *given, D, True), x[7:9])


@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dither_goes_up_as_often_as_it_should(dtype, share):
    """By columns of one number, and by numbers in one column."""
    gap = torch.finfo(dtype).eps
    columns = torch.full((1, 20_000), 1.0, dtype=dtype)
    numbers = (1 + gap * torch.arange(0, round(1 / gap) - 1, dtype=torch.float32)).to(dtype)[:, None]
    for z in (columns, numbers):
        up = (aten.dithered(z.float() + share * gap, z).float() > z.float()).float().mean()
        assert abs(up - share) < 5 * (share * (1 - share) / z.numel()) ** 0.5


# in the ordinary run each magnitude twice; slow: with every dtype, component and bias
@pytest.mark.parametrize(
    "magnitude, component, dtype, bias",
    crossed(list(product([1e-4, 1e-3, 1e-2, 1e-1], ["scale", "offset"])), DTYPES, [False, True]),
)
def test_dither_keeps_small_scales_and_offsets(dtype, component, magnitude, bias):
    def dithered(**given):
        return head_affine_linear(**given, form="dither")

    seen = gain(dithered, inputs(dtype, bias), **{component: vectors_of(magnitude)})
    assert seen.error < 0.1
    assert abs(seen.value - 1) <= 5 * seen.error + 2.0**-9, seen


@pytest.mark.parametrize("component", ["scale", "offset"])
def test_dither_keeps_a_small_one_beside_a_large_one(component):
    other = {"scale": "offset", "offset": "scale"}[component]
    large = vectors_of(1.0)

    def dithered(**given):
        return head_affine_linear(**given, **{other: large}, form="dither")

    # a scale of 1 doubles z, and what is then added to z is not scaled
    seen = gain(dithered, inputs(torch.bfloat16, bias=True), **{component: vectors_of(1e-3)})
    assert abs(seen.value - 1) <= 5 * seen.error + 2.0**-9, seen


CASES = ["offset_some", "scale_some", "both_all", "both_different", "both_none"]


# in the ordinary run each case on both backends; slow: in both dtypes, with a bias and without
@pytest.mark.parametrize("case, backend, dtype, bias", crossed(list(product(CASES, BACKENDS)), DTYPES, [False, True]))
def test_dither_projection_matches_the_reference(device, accurate, dtype, case, bias, backend):
    torch.manual_seed(5)
    given = make(case, dtype, D=16, bias=bias)
    given = {k: None if x is None else x.to(device) for k, x in given.items()}
    asked = [name for name in FLOATS if given[name] is not None]
    for name in asked:
        given[name].requires_grad_()
    y = head_affine_linear(**given, form="dither", backend=backend)
    accurate(y, reference.affine_linear(**doubled(given)), eager(**given))
    dy = torch.randn(y.shape, device=device).to(dtype)
    expected = reference.affine_linear_backward(dy.double(), **doubled(given))
    by_hook = eager_in_orders(eager, given, asked, dy)
    for name, got in zip(asked, torch.autograd.grad(y, [given[n] for n in asked], dy), strict=True):
        accurate(got, getattr(expected, name), *by_hook[name])


@pytest.mark.parametrize(
    "asked",
    [("offset",), ("z", "offset"), pytest.param(("scale", "offset"), marks=pytest.mark.slow), ("z",), ("scale",)],
)
def test_dither_gives_the_gradients_asked_for(device, asked):
    torch.manual_seed(6)
    given = {k: None if x is None else x.to(device) for k, x in make("both_different", torch.float16, D=16).items()}
    dy = torch.randn(9, 40, device=device).half()
    found = []
    for names in (asked, ("z", "scale", "offset")):
        leaves = {name: given[name].clone().requires_grad_() for name in names}
        y = head_affine_linear(**{**given, **leaves}, form="dither", backend="triton")
        found.append(dict(zip(names, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)))
    for name in asked:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2e-3, atol=2e-3)


def names(launches):
    return [getattr(kernel, "fn", kernel).__name__ for kernel, _, _ in launches]


def test_dither_sweeps_once_each_way(device):
    """Beside the two products: one kernel forward, and one backward with the second stage of its sums."""
    given = make("both_all", torch.bfloat16, D=16, bias=False, rows=(3000,))
    given = {k: None if x is None else x.to(device) for k, x in given.items()}
    leaves = [given[name].requires_grad_() for name in ("z", "scale", "offset")]
    with recording("sm_90") as forward:
        y = head_affine_linear(**given, backend="triton")
    with recording("sm_90") as backward:
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert names(forward.launches) == ["_affine_fwd_kernel"]
    assert names(backward.launches) == ["_affine_bwd_kernel", "_sum_partials_kernel"]


def test_dither_of_an_offset_that_is_folded_is_the_fold(device):
    given = make("offset_some", torch.bfloat16, D=16)
    folded = torch.randn(40)
    run = {"z": given["z"], "weight": given["weight"], "folded": folded}
    assert torch.equal(head_affine_linear(**run, form="dither"), head_affine_linear(**run, form="fold"))
