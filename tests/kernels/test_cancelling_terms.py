"""Scales that take a head nearly out: what is left is small beside what was there, and is as right as a hook's."""

import pytest
import torch

from lofit_kernels import head_affine_linear
from tests.accuracy_rule import check

T, N, H, D = 40, 48, 8, 16


@pytest.mark.parametrize("form", ["auto", "pass", "delta", "dither"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [-1.0, -0.99, -0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_that_was_nearly_all_of_z_is_scaled_away(dtype, scale, with_bias, form):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(T, H, D, generator=generator)
    z[:, 2] *= 300
    z = z.view(T, H * D).to(dtype)
    weight = torch.randn(N, H * D, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype) if with_bias else None
    vectors = torch.full((1, D), scale)
    y = head_affine_linear(z, weight, bias, scale=vectors, scale_heads=[2], form=form)
    gain = torch.ones(H, D, dtype=torch.float64)
    gain[2] += scale
    scaled = z.double() * gain.view(-1)
    wide = None if bias is None else bias.double()
    exact = torch.nn.functional.linear(scaled, weight.double(), wide)
    check(y, exact, torch.nn.functional.linear(scaled.to(dtype), weight, bias))
