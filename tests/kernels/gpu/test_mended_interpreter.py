"""What Triton's interpreter does otherwise than its compiler, and stops our kernels."""

import pytest
import torch

pytest.importorskip("triton")

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture
def mends(device):
    if device.type != "cpu":
        pytest.skip("kernels are compiled here")
    # it mends as the kernels are imported
    from lofit_kernels.gpu import launch, mended_interpreter

    assert launch.INTERPRET
    return mended_interpreter


@triton.jit
def _listed_rows_kernel(x, y, n, row, D: tl.constexpr):
    """y[d] = x[row, d] + n where row is not negative, else n; n is counted in a loop"""
    d = tl.arange(0, D)
    total = tl.load(x + row * D + d, mask=(d < D) & (row >= 0), other=0.0)
    for _ in range(n):
        total += 1
    tl.store(y + d, total, mask=(row < 2) & (d < D))


@pytest.mark.parametrize("row", [-1, 0, 1])
def test_a_compared_number_is_a_mask_and_a_bound_ends_a_loop(mends, monkeypatch, row):
    masks, load = set(), interpreter.InterpreterBuilder.create_masked_load

    def seen(self, pointers, mask, *others):
        masks.add(mask.data.dtype)
        return load(self, pointers, mask, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", seen)
    x, y = torch.arange(16.0).view(2, 8), torch.full((8,), torch.nan)
    _listed_rows_kernel[(1,)](x, y, 3, row, 8)
    assert torch.equal(y, (x[row] if row >= 0 else torch.zeros(8)) + 3)
    assert masks == {np.dtype(bool)}


def test_a_second_call_changes_nothing(mends):
    def found():
        return interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_splat

    before = found()
    mends.mend()
    assert found() == before
    assert mends.spreads_booleans()
