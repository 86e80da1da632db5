"""The projection with the scale inside the GEMM, in delta and prologue form, against closed forms in float64."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from lofit_kernels.gpu import matmul
from lofit_kernels.gpu.launch import recording
from lofit_kernels.gpu.linear_forward import delta_linear, prologue_linear
from lofit_kernels.gpu.tiles import Tile
from tests.ordinary_sample import crossed, some_now

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = {"none": [], "one": [2], "some": [0, 3], "all": [0, 1, 2, 3]}
H = 4
FORMS = [delta_linear, prologue_linear]
# smaller than any tile of the table, so that toy shapes have several of them
TOY = Tile(4, 2, {"BLOCK_T": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SLICES": 2})


def parameters(names, D, device, size=0.25):
    heads = torch.tensor(HEADS[names], dtype=torch.int64, device=device)
    values = torch.randn(len(heads), D, generator=torch.Generator().manual_seed(1)).to(device) * size
    return values, heads


def gain_of(a, heads, D, dtype):
    gain = torch.ones(H, D, dtype=dtype, device=a.device)
    gain[heads] += a.to(dtype)
    return gain.reshape(-1)


def linear_in(dtype, z, weight, addend, a, heads, D):
    """Every step in `dtype`, as the hook of an eager model computes it."""
    x = (z.to(dtype) * gain_of(a, heads, D, torch.promote_types(dtype, torch.float32))).to(dtype)
    # contiguous: on CPU a bfloat16 product of rows with gaps reads the gaps
    y = x @ weight.to(dtype).contiguous().T
    return y if addend is None else y + addend.to(dtype)


def check(accurate, form, z, weight, addend, a, heads, D, **options):
    args = (z, weight, addend, a, heads, D)
    before = [x.clone() for x in (z, weight, a)]
    y = form(*args, **options)
    assert y.dtype == z.dtype and y.shape == (z.shape[0], weight.shape[0]) and y.is_contiguous()
    accurate(y, linear_in(torch.float64, *args), linear_in(z.dtype, *args))
    assert all(torch.equal(x, old) for x, old in zip((z, weight, a), before, strict=True))
    assert torch.equal(y.view(torch.uint8), form(*args, **options).view(torch.uint8))
    return y


SHAPES = [
    (40, 72, 64, "some", "plain", True),
    (33, 40, 80, "some", "plain", True),
    (40, 33, 96, "one", "padded", False),
    (7, 100, 128, "all", "plain", True),
    (9, 30, 256, "one", "padded", True),
    (35, 50, 20, "all", "transposed", True),
    (5, 24, 16, "none", "plain", True),
    (300, 72, 8, "some", "plain", True),
]


# in the ordinary run each shape in one dtype and form; slow: each in every one
@pytest.mark.parametrize("T, N, D, names, kind, bias, dtype, form", crossed(SHAPES, DTYPES, FORMS))
def test_linear_matches_float64(device, poisoned, accurate, rows, form, dtype, T, N, D, names, kind, bias):
    z, weight = rows(T, H * D, dtype, kind), rows(N, H * D, dtype, kind, seed=4)
    addend = rows(1, N, torch.float32, seed=5)[0] if bias else None
    a, heads = parameters(names, D, device)
    check(accurate, form, z, weight, addend, a, heads, D, tile=TOY, descriptors=False)


DESCRIBED = [(40, 72, 64, "some"), (33, 41, 80, "some"), (7, 136, 24, "one"), (35, 16, 256, "none")]


@pytest.mark.parametrize("T, N, D, names, dtype, form", crossed(DESCRIBED, DTYPES[1:], FORMS))
def test_linear_through_descriptors(device, poisoned, accurate, rows, form, dtype, T, N, D, names):
    # rows of a wider tensor: what lies beyond them must not be read
    z, weight = (rows(n, H * D + 8, dtype, seed=n) for n in (T, N))
    z[:, H * D :], weight[:, H * D :] = float("nan"), float("nan")
    z, weight = z[:, : H * D], weight[:, : H * D]
    addend = rows(1, N, torch.float32, seed=5)[0]
    a, heads = parameters(names, D, device)
    through = check(accurate, form, z, weight, addend, a, heads, D, tile=TOY, descriptors=True)
    torch.testing.assert_close(through, form(z, weight, addend, a, heads, D, tile=TOY, descriptors=False))


@pytest.mark.parametrize("form, descriptors, slices", crossed(FORMS, list(product([False, True], [1, 4]))))
def test_linear_epilogue_in_slices(device, poisoned, accurate, rows, form, descriptors, slices):
    tile = Tile(4, 2, {**TOY.blocks, "SLICES": slices})
    z, weight = rows(40, H * 32, torch.float16), rows(136, H * 32, torch.float16, seed=4)
    a, heads = parameters("some", 32, device)
    addend = rows(1, 136, torch.float32, seed=5)[0]
    check(accurate, form, z, weight, addend, a, heads, 32, tile=tile, descriptors=descriptors)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize(
    "T, N, D, dtype",
    [
        (17, 576, 64, torch.bfloat16),
        pytest.param(130, 200, 160, torch.float16, marks=pytest.mark.slow),
        pytest.param(513, 136, 32, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_linear_with_the_tiles_of_the_table(device, poisoned, accurate, rows, form, T, N, D, dtype):
    z, weight = rows(T, H * D, dtype), rows(N, H * D, dtype, seed=4)
    a, heads = parameters("some", D, device)
    addend = rows(1, N, torch.float32, seed=5)[0]
    for descriptors in (None, False):
        args = (z, weight, addend, a, heads, D)
        y = form(*args, descriptors=descriptors)
        accurate(y, linear_in(torch.float64, *args), linear_in(dtype, *args))


def test_linear_adds_the_bias_before_it_rounds(device, rows):
    # y is near 256, where bfloat16 counts in steps of 2: bias and product are lost one by one, but not together
    D = 16
    z = torch.full((4, H * D), 0.125, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(8, H * D, dtype=torch.bfloat16, device=device)
    weight[:, 0], weight[:, 1] = 2048.0, 6.0
    a, heads = parameters("none", D, device)
    for form in FORMS:
        y = form(z, weight, torch.full((8,), 0.5, device=device), a, heads, D)
        assert torch.equal(y, torch.full_like(y, 258.0)), form.__name__


def projected_gain(y, base, exact):
    """How much of the exact change is in y - base: its least-squares factor."""
    return ((y.double() - base.double()) * exact).sum().item() / (exact**2).sum().item()


@pytest.mark.parametrize("descriptors", some_now([False, True], True))
def test_delta_keeps_small_scales_alive(device, rows, descriptors):
    T, N, D = 256, 256, 32
    z, weight = rows(T, H * D, torch.bfloat16), rows(N, H * D, torch.bfloat16, seed=4)
    a, heads = parameters("one", D, device)
    a = 1e-4 * torch.sign(a)
    none = torch.zeros_like(a)
    columns = slice(2 * D, 3 * D)
    exact = (z[:, columns].double() * a.double()) @ weight[:, columns].double().T
    options = {"descriptors": descriptors}

    # the plain product cancels between two heads: what is left is the delta, before it is added to anything large
    pair = z.clone(), weight.clone()
    pair[0][:, 3 * D :], pair[1][:, 3 * D :] = z[:, columns], -weight[:, columns]
    pair[1][:, : 2 * D] = 0
    alone = delta_linear(*pair, None, a, heads, D, **options)
    assert projected_gain(alone, torch.zeros_like(alone), exact) == pytest.approx(1, abs=0.01)
    dead = prologue_linear(*pair, None, a, heads, D, **options)
    assert abs(projected_gain(dead, torch.zeros_like(dead), exact)) < 0.01

    # and after y, a hundred times larger than its last bit, has been rounded: right on average
    y, base = (delta_linear(z, weight, None, x, heads, D, **options) for x in (a, none))
    assert projected_gain(y, base, exact) == pytest.approx(1, abs=0.25)
    y, base = (prologue_linear(z, weight, None, x, heads, D, **options) for x in (a, none))
    assert torch.equal(y, base)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_without_rows(device, poisoned, rows, form, dtype):
    a, heads = parameters("some", 16, device)
    assert form(rows(0, H * 16, dtype), rows(24, H * 16, dtype), None, a, heads, 16).shape == (0, 24)
    assert form(rows(5, H * 16, dtype), rows(0, H * 16, dtype), None, a, heads, 16).shape == (5, 0)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_linear_errors_name_what_was_got(device, rows, form):
    z, weight = rows(3, H * 16, torch.float16), rows(8, H * 16, torch.float16)
    a, heads = parameters("some", 16, device)
    with pytest.raises(ValueError, match="z has 64 columns and weight 63"):
        form(z, weight[:, :-1], None, a, heads, 16)
    with pytest.raises(ValueError, match="head_dim 24 does not divide the 64 columns"):
        form(z, weight, None, a, heads, 24)
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 16\), got \(1, 16\)"):
        form(z, weight, None, a[:1], heads, 16)
    with pytest.raises(ValueError, match="bias must be float32 .* got torch.float16"):
        form(z, weight, weight[:, 0], a, heads, 16)
    with pytest.raises(ValueError, match="one dtype, got torch.float16, torch.bfloat16"):
        form(z, weight.bfloat16(), None, a, heads, 16)
    with pytest.raises(ValueError, match="got torch.float64"):
        form(z.double(), weight.double(), None, a, heads, 16)
    with pytest.raises(ValueError, match="cannot be described"):
        form(z[:, 16:], rows(8, H * 16 + 1, torch.float16)[:, : 3 * 16], None, a, heads, 16, descriptors=True)
    with pytest.raises(ValueError, match="cannot be described"):
        form(z.float(), weight.float(), None, a, heads, 16, descriptors=True)


@pytest.mark.parametrize("form", FORMS)
def test_linear_does_not_depend_on_the_default_dtype(device, rows, form):
    a, heads = parameters("some", 16, device)
    given = rows(5, H * 16, torch.float16), rows(24, H * 16, torch.float16, seed=2), None, a, heads, 16
    expected, before = form(*given), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(form(*given), expected)
    finally:
        torch.set_default_dtype(before)


def test_linear_launches(device, rows, monkeypatch):
    # an older Triton leaves out some descriptors, see test_tiles.py
    monkeypatch.setattr(matmul, "_TRITON", (3, 7))
    a, heads = parameters("some", 16, device)
    for form in FORMS:
        chosen = {}
        for arch in ("sm_80", "sm_90"):
            for T in (64, 65, 513):
                for dtype in DTYPES:
                    with recording(arch) as recorded:
                        form(rows(T, H * 16, dtype), rows(24, H * 16, dtype), None, a, heads, 16)
                    assert len(recorded.launches) == 1
                    options = recorded.launches[0][2]
                    assert options["DESCRIPTORS"] == (arch == "sm_90" and dtype != torch.float32)
                    chosen[arch, T, dtype] = options["BLOCK_T"], options["BLOCK_N"]
        assert chosen["sm_90", 64, torch.float16] == (64, 128)
        assert chosen["sm_90", 65, torch.float16] == (128, 128)
        assert chosen["sm_80", 513, torch.bfloat16] == (128, 256)
        # a row of 65 elements cannot be described: plain loads
        with recording("sm_90") as recorded:
            form(rows(8, H * 16, torch.float16, "padded"), rows(24, H * 16, torch.float16), None, a, heads, 16)
        assert not recorded.launches[0][2]["DESCRIPTORS"]
