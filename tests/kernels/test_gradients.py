"""Which gradients the public functions give, and that they are the derivative: float64 on the CPU."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lofit_kernels import head_affine, head_affine_linear, reference
from lofit_kernels.answers import Path
from lofit_kernels.op_arguments import Arguments
from lofit_kernels.projection import affine_linear_bwd
from tests.kernels.op_inputs import CASE_FORMS, FLOATS, HEADS, H, N, doubled, make, small


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
        arguments = Arguments(None, weight, None, *vectors, None, Path("fold", "aten", "vendor"))
        *_, d_offset = affine_linear_bwd(dy, arguments, needs)
    assert d_offset.shape == offset.shape
    # the thin product at most, never T of them
    assert counter.get_total_flops() <= 2 * N * 2 * 64
