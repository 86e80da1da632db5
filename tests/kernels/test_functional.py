"""The public functions on the CPU against float64, by the rule of tests/accuracy_rule.py: values, gradients, shapes."""

import pytest
import torch
from torch.nn.functional import linear

from lofit_kernels import fold_offset, head_affine, head_affine_linear, head_index, reference
from tests.accuracy_rule import check_with_dtype
from tests.kernels.op_inputs import (
    CASE_FORMS,
    DTYPES,
    FLOATS,
    HEADS,
    H,
    N,
    T,
    doubled,
    eager,
    eager_affine,
    eager_in_orders,
    gradients,
    make,
)


@pytest.mark.parametrize("D, bias", [(64, False), (64, True), (80, True), (96, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, form", CASE_FORMS)
def test_affine_linear_is_accurate(case, form, dtype, bias, D):
    inputs = make(case, dtype, D, bias)
    got = head_affine_linear(**inputs, form=form)
    check_with_dtype(got, reference.affine_linear(**doubled(inputs)), eager(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, form", CASE_FORMS)
def test_affine_linear_gradients_are_accurate(case, form, dtype):
    inputs = make(case, dtype, rows=(3, 11))
    asked = [name for name in FLOATS if inputs[name] is not None]
    for name in asked:
        inputs[name].requires_grad_()
    y = head_affine_linear(**inputs, form=form)
    grad = torch.randn(y.shape).to(dtype)
    expected = reference.affine_linear_backward(grad.double(), **doubled(inputs))
    got, eagerly = gradients(y, inputs, asked, grad), eager_in_orders(eager, inputs, asked, grad)
    for name in asked:
        check_with_dtype(got[name], getattr(expected, name), *eagerly[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HEADS)
def test_affine_is_accurate(case, dtype):
    inputs = make(case, dtype, bias=False, rows=(2, 5))
    del inputs["weight"], inputs["bias"]
    got = head_affine(**inputs)
    check_with_dtype(got, reference.affine(**doubled(inputs)), eager_affine(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HEADS)
def test_affine_gradients_are_accurate(case, dtype):
    inputs = make(case, dtype, bias=False, rows=(2, 5))
    del inputs["weight"], inputs["bias"]
    asked = [name for name in ("z", "scale", "offset") if inputs[name] is not None]
    for name in asked:
        inputs[name].requires_grad_()
    y = head_affine(**inputs)
    grad = torch.randn(y.shape).to(dtype)
    identity = torch.eye(y.shape[-1], dtype=torch.float64)
    expected = reference.affine_linear_backward(grad.double(), weight=identity, **doubled(inputs))
    got, eagerly = gradients(y, inputs, asked, grad), eager_in_orders(eager_affine, inputs, asked, grad)
    for name in asked:
        check_with_dtype(got[name], getattr(expected, name), *eagerly[name])


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
    check_with_dtype(folded, expected, eagerly)


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
    check_with_dtype(got, reference.affine_linear(**doubled(inputs)), eager(**inputs))
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


@pytest.mark.parametrize("case", ["offset_some", "both_different"])
def test_affine_linear_takes_a_folded_offset_beside_a_trained_weight_with_its_gradient_only(case):
    inputs = doubled(make(case, torch.float32))
    offset, heads, weight = inputs.pop("offset"), inputs.pop("offset_heads"), inputs["weight"].requires_grad_()
    folded = fold_offset(weight, offset, heads)
    with pytest.raises(ValueError, match="the weight would get no gradient .* a folded offset without a graph"):
        head_affine_linear(**inputs, folded=folded)
    with torch.no_grad():
        expected = head_affine_linear(**inputs, folded=folded)
    # the offset beside it, or a fold of the caller's own that the weight has a part in
    dense = offset.new_zeros(weight.shape[1]).view(-1, offset.shape[1]).index_copy(0, heads, offset).flatten()
    own = head_affine_linear(**inputs, folded=weight @ dense)
    with pytest.raises(ValueError, match="its gradient through W v twice, .* expected one of them"):
        head_affine_linear(**inputs, folded=weight @ dense, offset=offset, offset_heads=heads)
    beside = head_affine_linear(**inputs, folded=folded, offset=offset, offset_heads=heads)
    grads = []
    for y in (own, beside):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        grads.append(torch.autograd.grad(y.sum(), weight)[0])
    wanted = reference.affine_linear_backward(
        torch.ones_like(own), **doubled(inputs), offset=offset, offset_heads=heads
    ).weight
    for grad in grads:
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-11)


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
