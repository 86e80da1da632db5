"""The public functions inside torch.autocast: what is rounded, and what stays wide."""

import pytest
import torch
from torch.nn.functional import linear

from lofit_kernels import fold_offset, head_affine_linear, reference
from tests.accuracy_rule import check_with_dtype
from tests.kernels.op_inputs import CASE_FORMS, FLOATS, H, N, doubled, eager, eager_in_orders, gradients, make


def eager_16_bits(**inputs):
    """`eager` under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return eager(**inputs)


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
    check_with_dtype(y, reference.affine_linear(**doubled(rounded)), y_eager)
    grad = torch.randn(y.shape).bfloat16()
    expected = reference.affine_linear_backward(grad.double(), **doubled(rounded))
    got, eagerly = gradients(y, inputs, asked, grad), eager_in_orders(eager_16_bits, inputs, asked, grad)
    for name in asked:
        assert got[name].dtype == torch.float32
        check_with_dtype(got[name], getattr(expected, name), *eagerly[name])


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
        y = head_affine_linear(**inputs)
        grad = torch.randn(y.shape).bfloat16()
        (got,) = torch.autograd.grad(y, offset, grad)
    eagerly = eager_in_orders(eager_16_bits, inputs, ["offset"], grad)["offset"]
    rounded = {k: v.bfloat16() if k in ("z", "weight", "bias") else v for k, v in inputs.items()}
    expected = reference.affine_linear_backward(grad.double(), **doubled(rounded)).offset
    check_with_dtype(got, expected, *eagerly)
    # sums over tokens stay wide: a step through bfloat16 would show
    assert (got.double() - expected).abs().max() < 1e-4 * expected.abs().max()
