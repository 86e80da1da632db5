"""Small scales and offsets in 16 bits: how much of them reaches y (see benchmarks/proof/dead_zone.py for the gain).

The gain is known up to its standard error; a test allows five of them.
"""

import pytest
import torch
from torch.nn.functional import linear

from benchmarks.proof.dead_zone import Gain, H, gain, inputs, rows
from lofit_kernels import fold_offset, head_affine, head_affine_linear
from tests.ordinary_sample import crossed

MAGNITUDES = [1e-4, 1e-3, 1e-2, 1e-1]
DTYPES = [torch.bfloat16, torch.float16]
# below it, z (1 + a) rounds to z: half the distance to the next number, for a significand of almost 2
ZONE = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def assert_works(seen: Gain) -> None:
    # the sample must be able to tell 1 from 0 at all
    assert seen.error < 0.1
    # a deterministic part remains where W v or a z W^T is itself rounded to 16 bits: 2^-9 of the change at most
    assert abs(seen.value - 1) <= 5 * seen.error + 2.0**-9, seen


# in the ordinary run each magnitude once, here and below; slow: with every dtype, with a bias and without
@pytest.mark.parametrize("dtype, magnitude, bias", crossed(DTYPES, MAGNITUDES, [False, True]))
def test_affine_linear_delta_keeps_small_scales(dtype, magnitude, bias):
    def delta(**given):
        return head_affine_linear(**given, form="delta")

    assert_works(gain(delta, inputs(dtype, bias), scale=rows(magnitude)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_linear_chooses_the_form_that_keeps_small_scales(dtype):
    def few_heads(scale, **given):
        return head_affine_linear(**given, scale=scale[:1], scale_heads=[0])

    def exact_rows():
        # the others stay at zero, so that the exact change is that of the one head
        return rows(3e-4) * torch.tensor([[1.0], *[[0.0]] * (H - 1)])

    assert_works(gain(few_heads, inputs(dtype, bias=False), scale=exact_rows()))


@pytest.mark.parametrize("dtype, magnitude", crossed(DTYPES, MAGNITUDES))
def test_affine_linear_delta_keeps_small_scales_beside_offsets(dtype, magnitude):
    offset = rows(1.0)

    def delta(**given):
        return head_affine_linear(**given, offset=offset, form="delta")

    assert_works(gain(delta, inputs(dtype, bias=True), scale=rows(magnitude)))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_linear_pass_has_the_zone(dtype, magnitude):
    def elementwise(**given):
        return head_affine_linear(**given, form="pass")

    seen = gain(elementwise, inputs(dtype, bias=False), scale=rows(magnitude))
    if magnitude < ZONE[dtype]:
        assert seen.value == 0.0
    if magnitude > 16 * ZONE[dtype]:
        assert abs(seen.value - 1) < 0.05


@pytest.mark.parametrize("dtype, magnitude, bias", crossed(DTYPES, MAGNITUDES, [False, True]))
def test_affine_linear_fold_keeps_small_offsets(dtype, magnitude, bias):
    assert_works(gain(head_affine_linear, inputs(dtype, bias), offset=rows(magnitude)))


@pytest.mark.parametrize("dtype, magnitude, bias", crossed(DTYPES, [1e-4, 1e-2], [False, True]))
def test_affine_linear_folded_beforehand_keeps_small_offsets(dtype, magnitude, bias):
    def folded(offset, **given):
        return head_affine_linear(**given, offset=offset, folded=fold_offset(given["weight"], offset))

    assert_works(gain(folded, inputs(dtype, bias), offset=rows(magnitude)))


def test_affine_added_to_z_has_the_zone():
    def added(z, weight, bias, offset):
        return linear(head_affine(z, offset=offset), weight, bias)

    assert gain(added, inputs(torch.bfloat16, bias=False), offset=rows(1e-4)).value < 0.2


def test_affine_folded_into_a_narrow_bias_has_the_zone():
    def narrow(z, weight, bias, offset):
        return linear(z, weight, fold_offset(weight, offset, bias=bias).to(z.dtype))

    assert gain(narrow, inputs(torch.bfloat16, bias=True), offset=rows(1e-4)).value < 0.5
