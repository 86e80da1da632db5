"""The public functions on the CPU against the float64 reference: values, gradients and shapes.

Accuracy rule (docs/design): error against float64 <= max(2 x the error of eager PyTorch in the same dtype, one ulp of
the output dtype at the largest expected value).
"""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from lofit_kernels import fold_offset, head_affine, head_affine_linear, head_index, reference
from lofit_kernels.projection import affine_linear_bwd

H, N, T = 4, 40, 9
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOATS = ("z", "weight", "bias", "scale", "offset")

# heads of (scale, offset); None: no such component
HEADS = {
    "offset_all": (None, [0, 1, 2, 3]),
    "offset_some": (None, [1, 3]),
    "offset_none": (None, []),
    "scale_all": ([0, 1, 2, 3], None),
    "scale_some": ([2], None),
    "scale_none": ([], None),
    "both_all": ([0, 1, 2, 3], [0, 1, 2, 3]),
    "both_different": ([0, 3], [1, 2, 3]),
    "both_none": ([], []),
}


def forms_of(case: str) -> tuple[str, ...]:
    return ("fold",) if HEADS[case][0] is None else ("pass", "delta")


CASE_FORMS = [(case, form) for case in HEADS for form in forms_of(case)]


def make(case: str, dtype: torch.dtype, D: int = 64, bias: bool = True, rows: tuple[int, ...] = (T,)) -> dict:
    """Inputs of order one, already rounded to the dtypes they are used in."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "z": torch.randn(*rows, H * D).to(dtype),
        "weight": (torch.randn(N, H * D) / (H * D) ** 0.5).to(dtype),
        "bias": torch.randn(N).to(dtype) if bias else None,
    }
    for name, heads in zip(("scale", "offset"), HEADS[case], strict=True):
        inputs[name] = None if heads is None else (0.3 * torch.randn(len(heads), D)).to(wide)
        inputs[f"{name}_heads"] = None if heads is None else torch.tensor(heads, dtype=torch.int64)
    return inputs


def doubled(inputs: dict) -> dict:
    return {k: v.detach().double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


def eager(z, weight, bias, scale, scale_heads, offset, offset_heads) -> Tensor:
    """What a hook with wide parameters and an nn.Linear compute."""
    return linear(eager_affine(z, scale, scale_heads, offset, offset_heads), weight, bias)


def eager_affine(z, scale, scale_heads, offset, offset_heads) -> Tensor:
    D = (scale if scale is not None else offset).shape[1]
    x = z.unflatten(-1, (-1, D))
    if scale is not None:
        x = x * (1 + scale.new_zeros(x.shape[-2:]).index_copy(0, scale_heads, scale))
    if offset is not None:
        x = x + offset.new_zeros(x.shape[-2:]).index_copy(0, offset_heads, offset)
    return x.flatten(-2).to(z.dtype)


def assert_accurate(got: Tensor, expected: Tensor, eagerly: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == eagerly.dtype
    if expected.numel() == 0:
        return
    error = (got.double() - expected).abs().max().item()
    allowed = (eagerly.double() - expected).abs().max().item()
    # eps spans a whole binade: one ulp at m is eps times the power of two below m
    largest = expected.abs().max()
    ulp = torch.finfo(got.dtype).eps * 2.0 ** torch.floor(torch.log2(largest)).item() if largest > 0 else 0.0
    assert error <= max(2 * allowed, ulp), f"error {error:.3e}; eager {allowed:.3e}, ulp {ulp:.3e}"


def gradients(y: Tensor, inputs: dict, asked, grad: Tensor) -> dict[str, Tensor | None]:
    leaves = [inputs[name] for name in asked]
    return dict(zip(asked, torch.autograd.grad(y, leaves, grad, allow_unused=True), strict=True))


@pytest.mark.parametrize("D, bias", [(64, False), (64, True), (80, True), (96, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, form", CASE_FORMS)
def test_affine_linear_is_accurate(case, form, dtype, bias, D):
    inputs = make(case, dtype, D, bias)
    got = head_affine_linear(**inputs, form=form)
    assert_accurate(got, reference.affine_linear(**doubled(inputs)), eager(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, form", CASE_FORMS)
def test_affine_linear_gradients_are_accurate(case, form, dtype):
    inputs = make(case, dtype, rows=(3, 11))
    asked = [name for name in FLOATS if inputs[name] is not None]
    for name in asked:
        inputs[name].requires_grad_()
    y, y_eager = head_affine_linear(**inputs, form=form), eager(**inputs)
    grad = torch.randn(y.shape).to(dtype)
    expected = reference.affine_linear_backward(grad.double(), **doubled(inputs))
    got, eagerly = gradients(y, inputs, asked, grad), gradients(y_eager, inputs, asked, grad)
    for name in asked:
        assert_accurate(got[name], getattr(expected, name), eagerly[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HEADS)
def test_affine_is_accurate(case, dtype):
    inputs = make(case, dtype, bias=False, rows=(2, 5))
    del inputs["weight"], inputs["bias"]
    got = head_affine(**inputs)
    assert_accurate(got, reference.affine(**doubled(inputs)), eager_affine(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HEADS)
def test_affine_gradients_are_accurate(case, dtype):
    inputs = make(case, dtype, bias=False, rows=(2, 5))
    del inputs["weight"], inputs["bias"]
    asked = [name for name in ("z", "scale", "offset") if inputs[name] is not None]
    for name in asked:
        inputs[name].requires_grad_()
    y, y_eager = head_affine(**inputs), eager_affine(**inputs)
    grad = torch.randn(y.shape).to(dtype)
    identity = torch.eye(y.shape[-1], dtype=torch.float64)
    expected = reference.affine_linear_backward(grad.double(), weight=identity, **doubled(inputs))
    got, eagerly = gradients(y, inputs, asked, grad), gradients(y_eager, inputs, asked, grad)
    for name in asked:
        assert_accurate(got[name], getattr(expected, name), eagerly[name])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 3], []])
def test_fold_offset_is_accurate(heads, dtype, bias):
    wide = torch.promote_types(dtype, torch.float32)
    weight, offset = torch.randn(N, H * 64).to(dtype), torch.randn(len(heads), 64).to(wide)
    b = torch.randn(N).to(dtype) if bias else None
    columns = weight.unflatten(1, (H, 64))[:, heads].flatten(1)
    expected = columns.double() @ offset.double().view(-1) + (0 if b is None else b.double())
    eagerly = columns.to(wide) @ offset.view(-1) + (0 if b is None else b)
    folded = fold_offset(weight, offset, heads, b)
    assert folded.dtype == wide
    assert_accurate(folded, expected, eagerly)


def test_fold_offset_has_no_gradient():
    weight, offset = torch.randn(N, H * 64, requires_grad=True), torch.randn(H, 64, requires_grad=True)
    assert not fold_offset(weight, offset).requires_grad


LAYOUTS = {
    "one_row_less_a_dimension": lambda K: torch.randn(K),
    "no_rows": lambda K: torch.randn(0, K),
    "no_rows_of_several": lambda K: torch.randn(3, 0, K),
    "batches": lambda K: torch.randn(2, 3, K),
    "batches_of_batches": lambda K: torch.randn(2, 3, 2, K),
    "transposed_batches": lambda K: torch.randn(5, 2, K).transpose(0, 1),
    "transposed_matrix": lambda K: torch.randn(K, 7).T,
    "strided_columns": lambda K: torch.randn(7, 2 * K)[:, ::2],
    "strided_rows": lambda K: torch.randn(14, K)[::2],
    "sliced": lambda K: torch.randn(2, 9, K + 6)[:, 1:6, 3 : 3 + K],
    "expanded": lambda K: torch.randn(1, K).expand(6, K),
    "heads_first": lambda K: torch.randn(2, H, 5, K // H).transpose(1, 2).reshape(2, 5, K).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case, form", [("offset_some", "fold"), ("both_different", "pass"), ("both_different", "delta")]
)
def test_affine_linear_takes_any_layout(case, form, layout):
    inputs = doubled(make(case, torch.float32))
    inputs["z"] = LAYOUTS[layout](H * 64).double().requires_grad_()
    asked = [name for name in FLOATS if inputs[name] is not None]
    for name in asked:
        inputs[name].requires_grad_()
    y = head_affine_linear(**inputs, form=form)
    torch.testing.assert_close(y, reference.affine_linear(**doubled(inputs)), rtol=1e-12, atol=1e-12)
    # a gradient with strides of its own
    grad = torch.randn(*y.shape[:-1], 2 * N, dtype=torch.float64)[..., ::2]
    expected = reference.affine_linear_backward(grad, **doubled(inputs))
    for name, got in gradients(y, inputs, asked, grad).items():
        torch.testing.assert_close(got, getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_affine_takes_any_layout(layout):
    inputs = doubled(make("both_different", torch.float32))
    del inputs["weight"], inputs["bias"]
    z = inputs["z"] = LAYOUTS[layout](H * 64).double().requires_grad_()
    scale, offset = inputs["scale"].requires_grad_(), inputs["offset"].requires_grad_()
    y = head_affine(**inputs)
    torch.testing.assert_close(y, reference.affine(**doubled(inputs)), rtol=1e-13, atol=1e-13)
    grad = torch.randn(*y.shape[:-1], 2 * H * 64, dtype=torch.float64)[..., ::2]
    identity = torch.eye(H * 64, dtype=torch.float64)
    expected = reference.affine_linear_backward(grad, weight=identity, **doubled(inputs))
    got = torch.autograd.grad(y, (z, scale, offset), grad)
    for g, name in zip(got, ("z", "scale", "offset"), strict=True):
        torch.testing.assert_close(g, getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_linear_input_is_left_alone(dtype):
    inputs = make("both_different", dtype)
    before = {k: v.clone() for k, v in inputs.items()}
    asked = [inputs[name].requires_grad_() for name in ("z", "scale", "offset")]
    grad = torch.randn(T, N).to(dtype)
    grad_before = grad.clone()
    torch.autograd.grad(head_affine_linear(**inputs), asked, grad)
    assert all(torch.equal(inputs[k], before[k]) for k in before)
    assert torch.equal(grad, grad_before)


@pytest.mark.parametrize("heads", [[1, 3], (1, 3), range(1, 4, 2), torch.tensor([1, 3])])
def test_affine_linear_takes_heads_as_any_sequence(heads):
    inputs = make("offset_some", torch.float32)
    expected = head_affine_linear(**inputs)
    assert torch.equal(head_affine_linear(**{**inputs, "offset_heads": heads}), expected)


def test_affine_linear_heads_left_out_are_all_heads():
    inputs = make("both_all", torch.float32)
    expected = head_affine_linear(**inputs)
    assert torch.equal(head_affine_linear(**{**inputs, "scale_heads": None, "offset_heads": None}), expected)


def test_affine_linear_without_vectors_is_linear():
    inputs = make("both_all", torch.float32)
    z, weight, bias = inputs["z"], inputs["weight"], inputs["bias"]
    assert torch.equal(head_affine_linear(z, weight, bias), linear(z, weight, bias))
    assert head_affine(z) is z


@pytest.mark.parametrize(
    "asked", list(product([False, True], repeat=5)), ids=lambda asked: "".join("01"[a] for a in asked)
)
@pytest.mark.parametrize(
    "case, form", [("offset_some", "fold"), ("both_different", "pass"), ("both_different", "delta")]
)
def test_affine_linear_gives_exactly_the_gradients_asked_for(case, form, asked):
    inputs = doubled(make(case, torch.float32, rows=(2, 3)))
    wanted = [name for name, ask in zip(FLOATS, asked, strict=True) if ask and inputs[name] is not None]
    for name in wanted:
        inputs[name].requires_grad_()
    y = head_affine_linear(**inputs, form=form)
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = reference.affine_linear_backward(grad, **doubled(inputs))
    for name in FLOATS:
        if name in wanted:
            torch.testing.assert_close(inputs[name].grad, getattr(expected, name), rtol=1e-12, atol=1e-12)
        else:
            assert inputs[name] is None or inputs[name].grad is None


@pytest.mark.parametrize(
    "asked", list(product([False, True], repeat=3)), ids=lambda asked: "".join("01"[a] for a in asked)
)
def test_affine_gives_exactly_the_gradients_asked_for(asked):
    inputs = doubled(make("both_different", torch.float32))
    del inputs["weight"], inputs["bias"]
    names = ("z", "scale", "offset")
    wanted = [name for name, ask in zip(names, asked, strict=True) if ask]
    for name in wanted:
        inputs[name].requires_grad_()
    y = head_affine(**inputs)
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    grad = torch.randn_like(y)
    y.backward(grad)
    identity = torch.eye(y.shape[-1], dtype=torch.float64)
    expected = reference.affine_linear_backward(grad, weight=identity, **doubled(inputs))
    for name in names:
        if name in wanted:
            torch.testing.assert_close(inputs[name].grad, getattr(expected, name), rtol=1e-12, atol=1e-12)
        else:
            assert inputs[name].grad is None


def small(case: str) -> dict:
    """Inputs small enough for finite differences."""
    torch.manual_seed(3)
    inputs = make(case, torch.float64, D=2, rows=(3,))
    return {k: v[:5] if k in ("weight", "bias") else v for k, v in inputs.items()}


@pytest.mark.parametrize("case, form", [(c, f) for c, f in CASE_FORMS if "none" not in c])
def test_affine_linear_gradcheck(case, form):
    inputs = small(case)
    names = [name for name in FLOATS if inputs[name] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]

    def run(*values):
        return head_affine_linear(**{**inputs, **dict(zip(names, values, strict=True))}, form=form)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("case", [c for c in HEADS if "none" not in c])
def test_affine_gradcheck(case):
    inputs = small(case)
    names = [name for name in ("z", "scale", "offset") if inputs[name] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]

    def run(*values):
        given = {**inputs, **dict(zip(names, values, strict=True))}
        return head_affine(**{k: v for k, v in given.items() if k not in ("weight", "bias")})

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("function", ["affine_linear", "affine"])
def test_affine_double_backward_raises(function):
    inputs = small("both_different")
    z = inputs["z"].requires_grad_()
    if function == "affine":
        y = head_affine(**{k: v for k, v in inputs.items() if k not in ("weight", "bias")})
    else:
        y = head_affine_linear(**inputs)
    (dz,) = torch.autograd.grad(y.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dz.square().sum().backward()


def test_affine_linear_offset_alone_costs_no_gemm_over_tokens():
    dy, weight, offset = torch.randn(64, N), torch.randn(N, H * 64), torch.randn(2, 64)
    needs = (False, False, False, False, True)
    with FlopCounterMode(display=False) as counter:
        vectors = (None, None, offset, torch.tensor([1, 3]))
        *_, d_offset = affine_linear_bwd(dy, None, weight, *vectors, needs, "fold", "aten", "vendor")
    assert d_offset.shape == offset.shape
    # the thin product at most, never T of them
    assert counter.get_total_flops() <= 2 * N * 2 * 64


@pytest.mark.parametrize("case, form", CASE_FORMS)
def test_affine_linear_under_autocast(case, form):
    inputs = make(case, torch.float32)
    asked = [name for name in FLOATS if inputs[name] is not None]
    for name in asked:
        inputs[name].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = head_affine_linear(**inputs, form=form)
        y_eager = eager(**inputs)
        y_linear = linear(inputs["z"], inputs["weight"], inputs["bias"])
    assert y.dtype == y_linear.dtype == torch.bfloat16
    rounded = {k: v.bfloat16() if k in ("z", "weight", "bias") else v for k, v in inputs.items()}
    assert_accurate(y, reference.affine_linear(**doubled(rounded)), y_eager)
    grad = torch.randn(y.shape).bfloat16()
    expected = reference.affine_linear_backward(grad.double(), **doubled(rounded))
    got, eagerly = gradients(y, inputs, asked, grad), gradients(y_eager, inputs, asked, grad)
    for name in asked:
        assert got[name].dtype == torch.float32
        assert_accurate(got[name], getattr(expected, name), eagerly[name])


def test_affine_linear_under_autocast_keeps_float64():
    inputs = make("both_different", torch.float64)
    expected = head_affine_linear(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head_affine_linear(**inputs), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_fold_offset_under_autocast_stays_wide(bias):
    weight, offset = torch.randn(N, H * 64), torch.randn(2, 64)
    b = torch.randn(N) if bias else None
    expected = fold_offset(weight, offset, [1, 3], b)
    with torch.autocast("cpu", torch.bfloat16):
        folded = fold_offset(weight, offset, [1, 3], b)
    assert folded.dtype == torch.float32
    assert torch.equal(folded, expected)


def test_affine_linear_backward_inside_autocast_is_accurate():
    inputs = make("offset_some", torch.float32, rows=(256,))
    offset = inputs["offset"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, y_eager = head_affine_linear(**inputs), eager(**inputs)
        grad = torch.randn(y.shape).bfloat16()
        (got,) = torch.autograd.grad(y, offset, grad)
        (eagerly,) = torch.autograd.grad(y_eager, offset, grad)
    rounded = {k: v.bfloat16() if k in ("z", "weight", "bias") else v for k, v in inputs.items()}
    expected = reference.affine_linear_backward(grad.double(), **doubled(rounded)).offset
    assert_accurate(got, expected, eagerly)
    # sums over tokens stay wide: a step through bfloat16 would show
    assert (got.double() - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case, form", CASE_FORMS)
def test_affine_linear_in_inference_mode(case, form):
    inputs = make(case, torch.float32)
    expected = head_affine_linear(**inputs, form=form)
    with torch.inference_mode():
        y = head_affine_linear(**inputs, form=form)
    assert y.is_inference()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case, form", [("offset_some", "fold"), ("both_different", "pass"), ("both_different", "delta")]
)
def test_affine_linear_takes_a_folded_offset(case, form, dtype, bias):
    inputs = make(case, dtype, bias=bias)
    folded = fold_offset(inputs["weight"], inputs["offset"], inputs["offset_heads"])
    got = head_affine_linear(**inputs, folded=folded, form=form)
    assert_accurate(got, reference.affine_linear(**doubled(inputs)), eager(**inputs))
    # it is the folded vector that counts
    moved = head_affine_linear(**inputs, folded=folded + 1, form=form)
    assert ((moved - got).float() - 1).abs().max() < 0.1


def test_affine_linear_takes_a_folded_offset_without_a_gradient_only():
    inputs = make("offset_some", torch.float32)
    folded = fold_offset(inputs["weight"], inputs["offset"], inputs["offset_heads"])
    inputs["offset"].requires_grad_()
    with pytest.raises(ValueError, match="the offset would get no gradient"):
        head_affine_linear(**inputs, folded=folded)
    with torch.no_grad():
        assert not head_affine_linear(**inputs, folded=folded).requires_grad


def test_affine_linear_folded_offset_lets_the_other_gradients_through():
    inputs = doubled(make("both_different", torch.float32))
    folded = fold_offset(inputs["weight"], inputs["offset"], inputs["offset_heads"])
    z, scale = inputs["z"].requires_grad_(), inputs["scale"].requires_grad_()
    y = head_affine_linear(**inputs, folded=folded)
    expected = reference.affine_linear_backward(torch.ones_like(y), **doubled(inputs))
    got = torch.autograd.grad(y.sum(), (z, scale))
    torch.testing.assert_close(got[0], expected.z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], expected.scale, rtol=1e-12, atol=1e-12)


def test_head_index():
    assert head_index([0, 2], 4).equal(torch.tensor([0, 2]))
    empty = head_index([], 4)
    assert (empty.dtype, empty.shape) == (torch.int64, (0,))
