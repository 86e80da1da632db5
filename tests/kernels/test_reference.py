"""The reference against a loop over heads, against autograd, and against finite differences, in float64."""

import pytest
import torch
from torch import Tensor

from lofit_kernels import reference

T, H, D, N = 5, 4, 3, 6
CASES = {
    "scale": ([0, 2], None),
    "offset": (None, [1, 3]),
    "both": ([0, 1, 2, 3], [0, 1, 2, 3]),
    "different_heads": ([1], [0, 2, 3]),
    "no_heads": ([], []),
}


def make(case: str, bias: bool) -> dict[str, Tensor | None]:
    scale_heads, offset_heads = CASES[case]
    rows = {name: None if heads is None else heads for name, heads in zip("so", CASES[case], strict=True)}
    return {
        "z": torch.randn(2, T, H * D, dtype=torch.float64),
        "weight": torch.randn(N, H * D, dtype=torch.float64),
        "bias": torch.randn(N, dtype=torch.float64) if bias else None,
        "scale": None if rows["s"] is None else torch.randn(len(scale_heads), D, dtype=torch.float64),
        "scale_heads": None if rows["s"] is None else torch.tensor(scale_heads, dtype=torch.int64),
        "offset": None if rows["o"] is None else torch.randn(len(offset_heads), D, dtype=torch.float64),
        "offset_heads": None if rows["o"] is None else torch.tensor(offset_heads, dtype=torch.int64),
    }


def naive(z, weight, bias, scale, scale_heads, offset, offset_heads) -> Tensor:
    """Head by head, as the paper writes it: sum over heads of W_h ((1 + a_h) z_h + v_h)."""
    y = torch.zeros(*z.shape[:-1], weight.shape[0], dtype=z.dtype)
    for head in range(H):
        columns = slice(head * D, (head + 1) * D)
        x = z[..., columns]
        if scale is not None and head in scale_heads.tolist():
            x = (1 + scale[scale_heads.tolist().index(head)]) * x
        if offset is not None and head in offset_heads.tolist():
            x = x + offset[offset_heads.tolist().index(head)]
        y = y + x @ weight[:, columns].T
    return y if bias is None else y + bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_affine_linear_reference_is_the_loop_over_heads(case, bias):
    inputs = make(case, bias)
    torch.testing.assert_close(reference.affine_linear(**inputs), naive(**inputs), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_affine_reference_is_the_projection_by_the_identity(case):
    inputs = make(case, bias=False)
    identity = torch.eye(H * D, dtype=torch.float64)
    expected = naive(**{**inputs, "weight": identity})
    got = reference.affine(**{k: v for k, v in inputs.items() if k not in ("weight", "bias")})
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_affine_linear_reference_backward_is_autograds(case, bias):
    inputs = make(case, bias)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if v is not None and v.is_floating_point()}
    y = naive(**inputs)
    grad = torch.randn_like(y)
    wanted = dict(zip(leaves, torch.autograd.grad(y, leaves.values(), grad, allow_unused=True), strict=True))
    got = reference.affine_linear_backward(grad, **{k: None if v is None else v.detach() for k, v in inputs.items()})
    for name in ("z", "weight", "bias", "scale", "offset"):
        if name not in leaves:
            assert getattr(got, name) is None
            continue
        expected = torch.zeros_like(leaves[name]) if wanted[name] is None else wanted[name]
        torch.testing.assert_close(getattr(got, name), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["scale", "offset", "different_heads"])
def test_affine_linear_reference_gradcheck(case):
    inputs = make(case, bias=True)
    names = [k for k, v in inputs.items() if v is not None and v.is_floating_point()]
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: reference.affine_linear(**{**inputs, **dict(zip(names, values, strict=True))}), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_affine_reference_rounds_once(dtype):
    z = torch.randn(64, H * D).to(dtype)
    a, v, heads = torch.randn(H, D), torch.randn(H, D), torch.arange(H)
    expected = ((1 + a.view(-1)) * z.float() + v.view(-1)).to(dtype)
    assert torch.equal(reference.affine(z, a, heads, v, heads), expected)


def test_affine_reference_without_vectors_is_the_input():
    z = torch.randn(T, H * D)
    assert reference.affine(z) is z
