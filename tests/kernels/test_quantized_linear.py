"""Products in 8 bits: against float64 on the quantized numbers, and within the bound of rounding on the exact ones."""

import copy
import io

import pytest
import torch

from lofit_kernels import product_kinds
from lofit_kernels.product_kinds import KINDS, kind_for, trial_error
from lofit_kernels.quantized_linear import FrozenWeight, FullColumns, quantized_linear

CPU = torch.device("cpu")
HERE = [name for name, kind in KINDS.items() if trial_error(kind, CPU) is None]
T, N, K = 19, 32, 48


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param not in HERE:
        pytest.skip(f"{request.param}: {trial_error(KINDS[request.param], CPU)}")
    return KINDS[request.param]


@pytest.fixture
def frozen(kind):
    weight = torch.nn.Parameter(draw(N, K, seed=1), requires_grad=False)
    held = FrozenWeight(weight, kind)
    yield held
    held.close()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dequantized(x, kind, top):
    """Rows of x as the kind sees them, in float64."""
    scale = x.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / top
    scaled = x.float() * (1 / scale) if top != kind.weight_top else x.float() / scale
    if kind.rows.is_floating_point:
        return scaled.clamp(-top, top).to(kind.rows).double() * scale
    return scaled.round().double() * scale


def bound(x, w, kind):
    """Largest error of x w^T that rounding rows of both can make: (T, N)."""
    if kind.rows.is_floating_point:
        # half a unit in the last of e4m3's 3 bits, or of its smallest number
        dx, dw = (
            t.abs() * 2**-4 + t.abs().amax(1, keepdim=True) / top * 2**-10
            for t, top in ((x, kind.row_top), (w, kind.weight_top))
        )
    else:
        dx, dw = (
            (t.abs().amax(1, keepdim=True) / top / 2).expand_as(t)
            for t, top in ((x, kind.row_top), (w, kind.weight_top))
        )
    return dx @ w.abs().t() + x.abs() @ dw.t() + dx @ dw.t()


def gradients(x, shift, frozen, grad):
    x, shift = x.clone().requires_grad_(), shift.clone().requires_grad_()
    y = quantized_linear(x, frozen, shift)
    return y.detach(), *torch.autograd.grad(y, (x, shift), grad)


def test_this_machine_has_a_kind():
    assert kind_for("int8", CPU).name in HERE


def test_both_directions_within_the_bound_of_rounding(kind, frozen):
    x, shift, grad = draw(T, K), draw(N, seed=2), draw(T, N, seed=3)
    y, dx, d_shift = gradients(x, shift, frozen, grad)
    w = frozen.weight.double()
    assert ((y - x.double() @ w.t() - shift).abs() <= 1.001 * bound(x.double(), w, kind)).all()
    assert ((dx - grad.double() @ w).abs() <= 1.001 * bound(grad.double(), w.t(), kind)).all()
    torch.testing.assert_close(d_shift, grad.sum(0))
    # and not by being zeros
    assert torch.cosine_similarity(y.flatten(), (x @ frozen.weight.t() + shift).flatten(), dim=0) > 0.998


def test_rounding_the_operands_is_the_only_error(kind, frozen):
    x, shift, grad = draw(T, K), draw(N, seed=2), draw(T, N, seed=3)
    y, dx, _ = gradients(x, shift, frozen, grad)
    expected = dequantized(x, kind, kind.row_top) @ dequantized(frozen.weight, kind, kind.weight_top).t() + shift
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    back = dequantized(frozen.weight.t(), kind, kind.weight_top)
    torch.testing.assert_close(dx.double(), dequantized(grad, kind, kind.row_top) @ back.t(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def mixed(kind):
    """A weight that takes three columns of x in full, of which two are outliers in `with_outliers`."""
    weight = torch.nn.Parameter(draw(N, K, seed=1), requires_grad=False)
    held = FrozenWeight(weight, kind, FullColumns(torch.tensor([3, 17, 40]), K))
    yield held
    held.close()


def with_outliers():
    x = draw(T, K)
    x[:, 3] *= 50
    x[:, 40] -= 30
    return x


def test_columns_in_full_are_not_rounded_and_the_others_within_their_own_bound(kind, mixed):
    x, shift, grad = with_outliers(), draw(N, seed=2), draw(T, N, seed=3)
    y, dx, d_shift = gradients(x, shift, mixed, grad)
    w, rest = mixed.weight.double(), mixed.columns.rest.double()
    assert rest.sum() == K - 3
    allowed = 1.001 * bound(x.double() * rest, w * rest, kind) + 1e-5 * (x.double().abs() @ w.abs().t())
    assert ((y - x.double() @ w.t() - shift).abs() <= allowed).all()
    in_8_bits = dequantized(x * rest.float(), kind, kind.row_top) @ dequantized(w * rest, kind, kind.weight_top).t()
    expected = in_8_bits + x.double()[:, [3, 17, 40]] @ w[:, [3, 17, 40]].t() + shift
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    # dz is as it would be without
    plain = FrozenWeight(mixed.weight, kind)
    plain_y, plain_dx, plain_shift = gradients(x, shift, plain, grad)
    assert dx.equal(plain_dx) and d_shift.equal(plain_shift)
    exact = x.double() @ w.t() + shift
    assert (y - exact).norm() < 0.2 * (plain_y - exact).norm()
    plain.close()


def test_columns_in_full_take_16_bits_and_autocast(kind, mixed):
    x = with_outliers()
    low, y = x.bfloat16(), quantized_linear(x, mixed)
    assert quantized_linear(low, mixed).equal(quantized_linear(low.float(), mixed).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized_linear(x, mixed).equal(y.bfloat16())
    assert quantized_linear(x[:0], mixed).shape == (0, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(kind, dtype):
    weight = torch.nn.Parameter(draw(N, K, seed=1, dtype=dtype), requires_grad=False)
    frozen, wide = FrozenWeight(weight, kind), FrozenWeight(torch.nn.Parameter(weight.float()), kind)
    x, shift, grad = draw(T, K, dtype=dtype), draw(N, seed=2), draw(T, N, seed=3, dtype=dtype)
    y, dx, d_shift = gradients(x, shift, frozen, grad)
    exact_y, exact_dx, exact_shift = gradients(x.float(), shift, wide, grad.float())
    assert y.dtype == dx.dtype == dtype
    assert y.equal(exact_y.to(dtype)) and dx.equal(exact_dx.to(dtype)) and d_shift.equal(exact_shift)


def test_shapes_of_any_rank_and_few_rows(frozen):
    x = draw(2, 3, 5, K)
    y = quantized_linear(x, frozen)
    assert y.shape == (2, 3, 5, N)
    assert quantized_linear(x[0, 0, 0], frozen).equal(y[0, 0, 0])
    assert quantized_linear(x[:0], frozen).shape == (0, 3, 5, N)
    assert quantized_linear(x.transpose(0, 1), frozen).equal(y.transpose(0, 1))
    by_column = x[0, 0].t().contiguous().t()
    assert quantized_linear(by_column, frozen).equal(y[0, 0])


def test_a_row_depends_on_no_other(frozen):
    x = draw(T, K)
    y = quantized_linear(x, frozen)
    x[3] = 0
    x[4] = torch.nan
    x[5, 7] = torch.inf
    got = quantized_linear(x, frozen)
    assert not got[3].any() and got[4].isnan().all() and not got[5].isfinite().any()
    others = [t for t in range(T) if t not in (3, 4, 5)]
    assert got[others].equal(y[others])


def test_nothing_is_saved_of_the_activations(frozen):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        quantized_linear(draw(T, K).requires_grad_(), frozen)
    assert max(saved, default=0) <= K


def test_each_direction_is_packed_when_it_is_first_asked_for(frozen):
    assert not frozen._packed
    quantized_linear(draw(T, K), frozen)
    assert set(frozen._packed) == {False}
    quantized_linear(draw(T, K).requires_grad_(), frozen).sum().backward()
    assert set(frozen._packed) == {False, True}


def test_autocast_gives_what_a_linear_gives(frozen):
    x = draw(T, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(x, frozen)
    assert y.dtype == torch.bfloat16 and y.equal(quantized_linear(x, frozen).to(torch.bfloat16))


def test_a_closed_weight_is_refused(kind):
    frozen = FrozenWeight(torch.nn.Parameter(draw(N, K)), kind)
    frozen.close()
    with pytest.raises(RuntimeError, match="after its scope had ended"):
        quantized_linear(draw(T, K), frozen)


def test_a_second_derivative_is_refused(frozen):
    x = draw(T, K).requires_grad_()
    (dx,) = torch.autograd.grad(quantized_linear(x, frozen).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_wrong_product_is_refused(monkeypatch):
    kind = kind_for("int8", CPU)
    broken = product_kinds.ProductKind(**{**vars(kind), "run": lambda rows, *packed: kind.run(rows, *packed) * 0.999})
    monkeypatch.setitem(product_kinds.KINDS, kind.name, broken)
    with pytest.raises(ValueError, match=f"{kind.name} computes a wrong product: the largest error is"):
        kind_for("int8", CPU)


def test_the_default_device_and_dtype_refuse_no_kind():
    kind, before = kind_for("int8", CPU), torch.get_default_dtype()
    try:
        for device, dtype in (("meta", torch.float32), ("cpu", torch.bfloat16)):
            torch.set_default_dtype(dtype)
            with torch.device(device):
                assert kind_for("int8", CPU) is kind
    finally:
        torch.set_default_dtype(before)


def test_pairs_that_saturate_are_noticed():
    vnni = torch.cpu._is_vnni_supported()
    error = trial_error(KINDS["onednn"], CPU)
    assert vnni == (error is None), error


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [("fp8", "cpu", "fp8 products are for GPUs"), ("int8", "meta", "known on CPUs and CUDA devices, got meta")],
)
def test_what_a_device_lacks_is_refused(precision, device, message):
    with pytest.raises(ValueError, match=message):
        kind_for(precision, torch.device(device))


@pytest.mark.parametrize(("precision", "capability"), [("int8", (7, 5)), ("fp8", (8, 0))])
def test_an_older_gpu_is_refused(precision, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=f"{precision} products take compute capability"):
        kind_for(precision, torch.device("cuda"))


@pytest.mark.parametrize("name", ["int_mm", "scaled_mm"])
def test_the_kinds_of_a_gpu_have_shapes_and_dtypes_without_one(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind = KINDS[name]
    with FakeTensorMode():
        x = torch.empty(T, K, device="cuda")
        rows, scales = kind.quantize(x)
        assert rows.dtype == kind.rows and scales.shape == (T, 1)
        y = torch.ops.lofit.frozen_product(rows, torch.empty((), dtype=torch.int64), N, False, name)
        assert y.shape == (T, N) and y.dtype == kind.accumulators and y.device.type == "cuda"


@pytest.mark.slow
def test_a_compiler_rounds_what_two_products_share_once():
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    kind, counts = kind_for("int8", CPU), []

    def count(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        counts.append([sum(word in name for name in names) for word in ("amax", "frozen_product")])
        return make_boxed_func(graph.forward)

    # as Inductor does
    by = {"fw_compiler": count, "bw_compiler": count}
    columns = FullColumns(torch.tensor([3, 17]), K)
    pair = [FrozenWeight(torch.nn.Parameter(draw(N, K, seed=s), requires_grad=False), kind, columns) for s in (1, 2)]
    compiled = torch.compile(
        lambda x: sum(quantized_linear(2 * x, weight) for weight in pair),
        backend=aot_autograd(**by, partition_fn=min_cut_rematerialization_partition),
        fullgraph=True,
    )
    compiled(draw(T, K).requires_grad_()).sum().backward()
    torch._dynamo.reset()
    # forward and backward
    assert counts == [[1, 2], [1, 2]]


def test_a_weight_that_changes_after_it_was_used_is_refused(frozen):
    x = draw(T, K)
    quantized_linear(x, frozen)
    with torch.no_grad():
        frozen.weight.mul_(2)
    with pytest.raises(RuntimeError, match="a weight has changed after it was quantized"):
        quantized_linear(x, frozen)


def test_a_copy_has_products_of_its_own_weight_until_the_scope_is_over(frozen, kind):
    x = draw(T, K)
    before = quantized_linear(x, frozen)
    copied = copy.deepcopy(frozen)
    with torch.no_grad():
        # a power of two: the same integers
        copied.weight.mul_(2)
    if kind.scales_weights:
        assert quantized_linear(x, copied).equal(2 * before)
    else:
        with pytest.raises(RuntimeError, match="has changed"):
            quantized_linear(x, copied)
    assert quantized_linear(x, frozen).equal(before)
    frozen.close()
    with pytest.raises(RuntimeError, match="after its scope had ended"):
        quantized_linear(x, copied)


def test_pickling_is_refused(frozen):
    with pytest.raises(TypeError, match="weights are quantized: save it after"):
        torch.save(frozen, io.BytesIO())
