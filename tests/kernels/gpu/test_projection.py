"""The whole projection on the Triton backend: the same composition as on ATen, and with the scale inside the GEMMs."""

from itertools import product

import pytest
import torch
from torch.nn.functional import linear

from lofit_kernels import fold_offset, head_affine, head_affine_linear, head_index, reference
from lofit_kernels.dispatch import valid_paths
from lofit_kernels.gpu.launch import recording
from tests.kernels.op_inputs import eager_in_orders
from tests.ordinary_sample import crossed, slow_if

H, D, N, T = 4, 16, 24, 9
FLOATS = ("z", "weight", "bias", "scale", "offset")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def case(device):
    """(z, weight, bias, scale, its heads, offset, its heads, dy) in float64, on the device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    heads = [head_index(h, H, device) for h in ([0, 2], [1, 2, 3])]
    return draw(3, 3, H * D), draw(N, H * D) / 8, draw(N), draw(2, D) / 4, heads[0], draw(3, D), heads[1], draw(3, 3, N)


def cast(case, dtype):
    """Activations and weights in `dtype`, vectors in float32, all asking for gradients."""
    z, weight, bias, scale, scale_heads, offset, offset_heads, dy = case
    leaves = [x.to(d).requires_grad_() for x, d in ((z, dtype), (weight, dtype), (bias, dtype))]
    vectors = [x.float().requires_grad_() for x in (scale, offset)]
    return (*leaves, vectors[0], scale_heads, vectors[1], offset_heads, dy.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_on_triton_matches_the_reference(case, accurate, dtype):
    z, weight, bias, scale, scale_heads, offset, offset_heads, dy = cast(case, dtype)
    vectors = {"scale": scale, "scale_heads": scale_heads, "offset": offset, "offset_heads": offset_heads}
    inputs = {"z": z, "weight": weight, "bias": bias, **vectors}
    wide = [x.detach().double() for x in (z, weight, bias, scale)]
    exact = (*wide[:3], wide[3], scale_heads, offset.detach().double(), offset_heads)
    y = head_affine_linear(z, weight, bias, **vectors, backend="triton")
    accurate(y, reference.affine_linear(*exact), hooked(**inputs))
    leaves = (z, weight, bias, scale, offset)
    expected = reference.affine_linear_backward(dy.double(), *exact)
    by_hook = eager_in_orders(hooked, inputs, FLOATS, dy)
    for name, got in zip(FLOATS, torch.autograd.grad(y, leaves, dy), strict=True):
        assert got.dtype == by_hook[name][0].dtype, name
        accurate(got, getattr(expected, name), *by_hook[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_without_rows_on_triton(case, dtype):
    z, weight, bias, scale, scale_heads, offset, offset_heads, dy = cast(case, dtype)
    empty = z.detach()[:0].requires_grad_()
    y = head_affine_linear(
        empty,
        weight,
        bias,
        scale=scale,
        scale_heads=scale_heads,
        offset=offset,
        offset_heads=offset_heads,
        backend="triton",
    )
    assert y.shape == (0, 3, N)
    grads = torch.autograd.grad(y.sum(), (empty, scale, offset))
    assert [g.shape for g in grads] == [empty.shape, scale.shape, offset.shape]
    assert all(not g.any() for g in grads[1:])


SOME, ALL, NO_HEADS = [1, 3], list(range(H)), []
# heads of (scale, offset), whether the base has a bias
FUSED_CASES = {
    "a few heads": (SOME, None, False),
    "all heads": (ALL, None, False),
    "all heads, bias": (ALL, None, True),
    "no heads": (NO_HEADS, None, False),
    "offsets elsewhere": ([0, 2], [1, 2, 3], False),
    "offsets everywhere, bias": (SOME, ALL, True),
}
FUSED = [(form, gemm) for form in ("pass", "delta") for gemm in ("fused_forward", "fused_backward", "fused")]


def make(name: str, dtype, device, asked=FLOATS) -> dict:
    """Arguments of head_affine_linear; those in `asked` want gradients."""
    generator = torch.Generator().manual_seed(1)
    scale_heads, offset_heads, bias = FUSED_CASES[name]

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    inputs = {"z": draw(3, 3, H * D).to(dtype), "weight": (draw(N, H * D) / 8).to(dtype)}
    inputs["bias"] = draw(N).to(dtype) if bias else None
    for component, heads in (("scale", scale_heads), ("offset", offset_heads)):
        inputs[component] = None if heads is None else (draw(len(heads), D) / 4).float()
        inputs[f"{component}_heads"] = None if heads is None else head_index(heads, H, device)
    for leaf in asked:
        if inputs[leaf] is not None:
            inputs[leaf].requires_grad_()
    return inputs


def hooked(z, weight, bias, **vectors) -> torch.Tensor:
    """What an eager hook with float32 vectors computes."""
    return linear(head_affine(z, **vectors, backend="aten"), weight, bias)


def in_float64(inputs: dict) -> dict:
    return {k: v.detach().double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}


# in the ordinary run each case in one dtype and form; slow: each in every one
@pytest.mark.parametrize("form, name, dtype", crossed(["pass", "delta"], list(FUSED_CASES), DTYPES))
def test_projection_with_fused_products_matches_the_reference(device, accurate, form, name, dtype):
    inputs = make(name, dtype, device)
    dy = torch.randn(3, 3, N, generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    before = {k: None if v is None else v.detach().clone() for k, v in inputs.items()}
    y = head_affine_linear(**inputs, form=form, backend="triton", gemm="fused")
    accurate(y, reference.affine_linear(**in_float64(inputs)), hooked(**inputs))
    expected = reference.affine_linear_backward(dy.double(), **in_float64(inputs))
    asked = [leaf for leaf in FLOATS if inputs[leaf] is not None]
    leaves = [inputs[leaf] for leaf in asked]
    by_hook = eager_in_orders(hooked, inputs, asked, dy)
    for leaf, got in zip(asked, torch.autograd.grad(y, leaves, dy), strict=True):
        assert got.dtype == inputs[leaf].dtype, leaf
        accurate(got, getattr(expected, leaf), *(torch.zeros_like(got) if g is None else g for g in by_hook[leaf]))
    assert all(v is None or torch.equal(inputs[k], v) for k, v in before.items())


# in the ordinary run one, two or all of the gradients; slow: three and four
@pytest.mark.parametrize(
    "asked",
    slow_if(lambda asked: sum(map(int, asked)) in (3, 4), ["".join(a) for a in product("01", repeat=5) if "1" in a]),
)
def test_projection_with_fused_products_gives_exactly_the_gradients_asked_for(device, asked):
    names = [leaf for leaf, ask in zip(FLOATS, asked, strict=True) if ask == "1"]
    inputs = make("offsets everywhere, bias", torch.float32, device, names)
    y = head_affine_linear(**inputs, form="delta", backend="triton", gemm="fused_backward")
    dy = torch.randn(3, 3, N, generator=torch.Generator().manual_seed(2)).to(device)
    y.backward(dy)
    expected = reference.affine_linear_backward(dy.double(), **in_float64(inputs))
    for leaf in FLOATS:
        if leaf in names:
            wanted = getattr(expected, leaf)
            torch.testing.assert_close(inputs[leaf].grad.double(), wanted, rtol=1e-5, atol=1e-5)
        else:
            assert inputs[leaf].grad is None


def names_of(recorded) -> set[str]:
    """The kernels that were launched."""
    return {kernel.fn.__name__ for kernel, _, _ in recorded.launches}


@pytest.mark.parametrize("form, gemm", FUSED)
def test_projection_runs_the_products_of_its_path(device, form, gemm):
    inputs = make("a few heads", torch.float16, device, ("z", "scale"))
    with recording("sm_90") as recorded:
        y = head_affine_linear(**inputs, form=form, backend="triton", gemm=gemm)
    forward = names_of(recorded)
    with recording("sm_90") as recorded:
        y.backward(torch.ones_like(y))
    backward = names_of(recorded)
    product = {"pass": "_prologue_linear_kernel", "delta": "_delta_linear_kernel"}[form]
    sweeps = {"pass": {"_affine_fwd_kernel"}, "delta": {"_affine_fwd_kernel", "_affine_delta_fwd_kernel"}}[form]
    assert forward == ({product} if gemm in ("fused", "fused_forward") else sweeps)
    fused = "_affine_linear_bwd_kernel" if gemm in ("fused", "fused_backward") else "_affine_bwd_kernel"
    # all rows in one chunk: no sums are left to be added
    assert backward == {fused}


@pytest.mark.parametrize("form", ["pass", "delta"])
def test_projection_without_rows_through_fused_products(device, form):
    inputs = make("offsets everywhere, bias", torch.float16, device)
    inputs["z"] = inputs["z"].detach()[:0].requires_grad_()
    y = head_affine_linear(**inputs, form=form, backend="triton", gemm="fused")
    assert y.shape == (0, 3, N)
    grads = torch.autograd.grad(y.sum(), [inputs[leaf] for leaf in FLOATS])
    assert [g.shape for g in grads] == [inputs[leaf].shape for leaf in FLOATS]
    assert all(not g.any() for g in grads)


def test_projection_fused_delta_keeps_small_scales(device):
    """A scale of 2^-13 in float16: the prologue loses it, the accumulator of the delta form does not."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, H * D, generator=generator).half().to(device)
    weight = torch.randn(N, H * D, generator=generator).half().to(device)
    scale = torch.full((H, D), 2.0**-13, device=device)
    run = {"scale": scale, "backend": "triton", "gemm": "fused_forward"}
    assert torch.equal(head_affine_linear(z, weight, **run, form="pass"), linear_by(z, weight))
    assert not torch.equal(head_affine_linear(z, weight, **run, form="delta"), linear_by(z, weight))


def linear_by(z, weight):
    """The fused product at scale zero."""
    zero = torch.zeros(H, D, device=z.device)
    return head_affine_linear(z, weight, scale=zero, form="delta", backend="triton", gemm="fused_forward")


def test_valid_paths_all_run_and_agree(device):
    inputs = make("a few heads", torch.float32, device, ())
    expected = reference.affine_linear(**in_float64(inputs))
    for path in valid_paths(has_scale=True, dtype=torch.float32):
        y = head_affine_linear(**inputs, **path._asdict())
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_projection_with_fused_products_compiles_whole(device, dynamo):
    inputs = make("offsets elsewhere", torch.float32, device, ("z", "scale", "offset"))

    def run(z):
        return head_affine_linear(**{**inputs, "z": z}, form="delta", backend="triton", gemm="fused")

    y, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs["z"]), run(inputs["z"])
    assert torch.equal(y, expected)
    leaves = [inputs[leaf] for leaf in ("z", "scale", "offset")]
    dy = torch.randn_like(y)
    pairs = zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True)
    assert all(torch.equal(got, wanted) for got, wanted in pairs)


def test_projection_with_fused_products_takes_a_folded_offset(device):
    inputs = make("offsets everywhere, bias", torch.float16, device, ())
    folded = fold_offset(inputs["weight"], inputs["offset"], inputs["offset_heads"])
    run = {"form": "delta", "backend": "triton", "gemm": "fused"}
    assert torch.equal(head_affine_linear(**inputs, folded=folded, **run), head_affine_linear(**inputs, **run))
