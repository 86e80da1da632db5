"""What backward keeps: nothing of z for an offset, z's own storage for a scale, in bytes."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lofit_kernels import head_affine, head_affine_linear

H, D, N, T = 4, 64, 48, 32
HEADS = [1, 3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype):
    """A producer's output z, as attention would hand it over, and a frozen projection."""
    z = torch.randn(2, T, H * D).to(dtype).requires_grad_() * 1
    return z, torch.randn(N, H * D).to(dtype), torch.randn(N).to(dtype)


def saved_by(run) -> tuple[list[Tensor], Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return saved, y


def activation_bytes(saved: list[Tensor], *constants: Tensor | None) -> int:
    """Bytes of saved storage that no parameter, weight or index accounts for; each storage once."""
    known = {c.untyped_storage().data_ptr() for c in constants if c is not None}
    extra = {s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in saved if s.dtype != torch.int64}
    return sum(size for pointer, size in extra.items() if pointer not in known)


@pytest.mark.parametrize("z_needs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_linear_offset_saves_no_activation(dtype, z_needs):
    z, weight, bias = make(dtype)
    z = z if z_needs else z.detach()
    offset = nn.Parameter(torch.randn(len(HEADS), D))
    saved, y = saved_by(lambda: head_affine_linear(z, weight, bias, offset=offset, offset_heads=HEADS))
    assert activation_bytes(saved, weight, bias, offset) == 0
    y.sum().backward()
    assert offset.grad is not None


@pytest.mark.parametrize("form", ["pass", "delta"])
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_linear_scale_saves_z_itself_and_nothing_else(dtype, with_offset, form):
    z, weight, bias = make(dtype)
    scale = nn.Parameter(torch.randn(len(HEADS), D))
    offset = nn.Parameter(torch.randn(len(HEADS), D)) if with_offset else None
    vectors = {"scale": scale, "scale_heads": HEADS}
    if with_offset:
        vectors |= {"offset": offset, "offset_heads": HEADS}
    saved, _ = saved_by(lambda: head_affine_linear(z, weight, bias, **vectors, form=form))
    kept = [s for s in saved if s.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()]
    assert [(k.data_ptr(), k.dtype, k.shape) for k in kept] == [(z.data_ptr(), dtype, z.shape)]
    assert activation_bytes(saved, weight, bias, scale, offset) == z.numel() * z.element_size()
    assert activation_bytes(saved, weight, bias, scale, offset, z) == 0


@pytest.mark.parametrize("form", ["pass", "delta"])
def test_affine_linear_frozen_scale_saves_no_activation(form):
    z, weight, bias = make(torch.float32)
    scale = torch.randn(len(HEADS), D)
    saved, _ = saved_by(lambda: head_affine_linear(z, weight, bias, scale=scale, scale_heads=HEADS, form=form))
    assert activation_bytes(saved, weight, bias, scale) == 0


def test_affine_linear_strided_z_is_saved_as_it_is():
    wide = torch.randn(T, 2 * H * D)
    z, scale = wide[:, ::2], nn.Parameter(torch.randn(H, D))
    weight = torch.randn(N, H * D)
    saved, _ = saved_by(lambda: head_affine_linear(z, weight, scale=scale))
    assert activation_bytes(saved, weight, scale, wide) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_offset_saves_no_activation(dtype):
    z, _, _ = make(dtype)
    offset = nn.Parameter(torch.randn(len(HEADS), D))
    saved, _ = saved_by(lambda: head_affine(z, offset=offset, offset_heads=HEADS))
    assert activation_bytes(saved, offset) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_scale_saves_z_itself_and_nothing_else(dtype):
    z, _, _ = make(dtype)
    scale = nn.Parameter(torch.randn(len(HEADS), D))
    saved, _ = saved_by(lambda: head_affine(z, scale=scale, scale_heads=HEADS))
    assert activation_bytes(saved, scale, z) == 0
    assert activation_bytes(saved, scale) == z.numel() * z.element_size()


def test_affine_linear_without_gradient_saves_nothing():
    z, weight, bias = make(torch.float32)
    offset = nn.Parameter(torch.randn(H, D))
    saved: list[Tensor] = []
    with torch.no_grad(), saved_tensors_hooks(saved.append, lambda tensor: tensor):
        head_affine_linear(z, weight, bias, offset=offset)
    assert saved == []
