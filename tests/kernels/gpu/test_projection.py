"""The whole projection on the Triton backend: the same composition as on ATen, other primitives."""

import pytest
import torch
from torch.nn.functional import linear

from lofit_kernels import head_affine, head_affine_linear, head_index, reference

H, D, N, T = 4, 16, 24, 9
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
    wide = [x.detach().double() for x in (z, weight, bias, scale)]
    exact = (*wide[:3], wide[3], scale_heads, offset.detach().double(), offset_heads)
    y = head_affine_linear(z, weight, bias, **vectors, backend="triton")
    eager = linear(head_affine(z, **vectors, backend="aten"), weight, bias)
    accurate(y, reference.affine_linear(*exact), eager)
    leaves = (z, weight, bias, scale, offset)
    expected = reference.affine_linear_backward(dy.double(), *exact)
    by_hook = torch.autograd.grad(eager, leaves, dy)
    for name, got, eager_grad in zip(expected._fields, torch.autograd.grad(y, leaves, dy), by_hook, strict=True):
        assert got.dtype == eager_grad.dtype, name
        accurate(got, getattr(expected, name), eager_grad)


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
