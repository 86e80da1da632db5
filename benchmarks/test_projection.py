"""One output projection, forward and backward: ours against the bare GEMMs and an eager hook. Run by `make bench`.

On a CPU these are CPU clock times of one machine; compare within a group, not between machines.
"""

import pytest
import torch
from torch.nn.functional import linear

from lofit_kernels import head_affine_linear, head_index

T, H, D, N = 1024, 16, 128, 2048
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = [1, 8]


def floor(z, w, a, v, heads):
    """The frozen projection: what no adapter can beat."""
    return linear(z, w)


def ours_offset(z, w, a, v, heads):
    """Offsets on a few heads."""
    return head_affine_linear(z, w, offset=v, offset_heads=heads)


def ours_scale(z, w, a, v, heads):
    """Scales on every head."""
    return head_affine_linear(z, w, scale=a)


def hook_offset(z, w, a, v, heads):
    """Offsets as an eager hook adds them: float32, cast back."""
    by_head = z.unflatten(-1, (H, D))
    dense = v.new_zeros(H, D).index_copy(0, heads, v)
    return linear((by_head + dense).flatten(-2).to(z.dtype), w)


def hook_scale(z, w, a, v, heads):
    """Scales as an eager hook multiplies them: float32, cast back."""
    return linear((z.unflatten(-1, (H, D)) * (1 + a)).flatten(-2).to(z.dtype), w)


PROVIDERS = [floor, ours_offset, hook_offset, ours_scale, hook_scale]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda f: f.__name__)
def test_projection(benchmark, provider, dtype):
    benchmark.group = f"{DEVICE} {dtype} T={T} K={H * D} N={N}"
    torch.manual_seed(0)
    z = torch.randn(T, H * D, device=DEVICE).to(dtype).requires_grad_()
    w = torch.randn(N, H * D, device=DEVICE).div(45).to(dtype)
    a = (torch.randn(H, D, device=DEVICE) * 0.1).requires_grad_()
    v = (torch.randn(len(FEW), D, device=DEVICE) * 0.1).requires_grad_()
    heads = head_index(FEW, H, DEVICE)
    dy = torch.randn(T, N, device=DEVICE).to(dtype)
    wanted = [x for x, name in ((z, ""), (a, "scale"), (v, "offset")) if name in provider.__name__]

    def step():
        grads = torch.autograd.grad(provider(z, w, a, v, heads), wanted, dy)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return grads

    grads = benchmark(step)
    assert all(g.isfinite().all() for g in grads)
