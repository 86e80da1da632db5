"""The tests' quicker interpreter computes what Triton's own does, and puts everything back."""

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from lofit_kernels.gpu.affine import affine_bwd, affine_fwd
from tests import quick_interpreter


@pytest.fixture
def own(device):
    """Triton's own function, and the calls of it that are made meanwhile."""
    if device.type != "cpu":
        pytest.skip("kernels are compiled here")
    found, calls = getattr(interpreter._patch_lang, "original", interpreter._patch_lang), []

    def counted(fn):
        calls.append(fn)
        return found(fn)

    return counted, calls


def computed(rows, dtype):
    z, grad = rows(70, 64, dtype), rows(70, 64, dtype, seed=3)
    heads = torch.tensor([0, 2])
    scale = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    return [affine_fwd(z, scale, heads, scale, heads, 16), *affine_bwd(grad, z, scale, heads, heads, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits(own, rows, monkeypatch, dtype):
    patch, calls = own
    monkeypatch.setattr(interpreter, "_patch_lang", patch)
    expected, slow = computed(rows, dtype), len(calls)
    calls.clear()
    before = (tl.sum, tl.zeros, tl.load, vars(tl.tensor).get("__index__"))
    monkeypatch.setattr(interpreter, "_patch_lang", quick_interpreter.once_for_a_launch(patch))
    got = computed(rows, dtype)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True))
    assert len(calls) < slow
    assert (tl.sum, tl.zeros, tl.load, vars(tl.tensor).get("__index__")) == before


def test_a_kernel_that_fails_leaves_nothing_behind(own, rows, monkeypatch):
    monkeypatch.setattr(interpreter, "_patch_lang", quick_interpreter.once_for_a_launch(own[0]))
    before = tl.load

    def fails(*args, **options):
        raise RuntimeError("planted")

    with monkeypatch.context() as broken:
        # of the class: undone on the object, its own method would stay on it, and hide what is put on the class
        broken.setattr(interpreter.InterpreterBuilder, "create_masked_load", fails)
        with pytest.raises(Exception, match="planted"):
            computed(rows, torch.float32)
    assert tl.load is before
    assert all(x.isfinite().all() for x in computed(rows, torch.float32))
