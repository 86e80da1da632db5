"""What `make sanitize` runs beside the kernels' own tests: planted faults, and bfloat16 as it is compiled.

Only under ttsem (see sanitize.py); pytest does not collect it on its own.
"""

import pytest
import torch
from ttsem.sanitize import KernelFault

from lofit_kernels.gpu.affine import affine_fwd
from lofit_kernels.gpu.linear_forward import delta_linear, prologue_linear
from lofit_kernels.gpu.tiles import Tile
from tests.proof import planted

DEVICE = torch.device("cuda")


@pytest.mark.parametrize(
    "kernel, kind",
    [
        (planted._reads_beyond_kernel, "oob_read"),
        (planted._writes_beyond_kernel, "oob_write"),
        (planted._two_writers_kernel, "race"),
        (planted._reads_a_neighbour_kernel, "race"),
    ],
)
def test_sanitizer_finds_a_planted_fault_at_its_line(kernel, kind):
    with pytest.raises(KernelFault) as caught:
        planted.launch(kernel, DEVICE)
    found, line = caught.value.fault, planted.planted_line(kernel)
    assert found.kind == kind
    assert found.source_line == line or (kind == "race" and f":{line}" in str(caught.value))


def test_sanitizer_is_silent_about_a_sound_kernel():
    assert torch.equal(planted.launch(planted._sound_kernel, DEVICE).cpu(), torch.full((100,), 2.0))


def test_bfloat16_is_rounded_to_nearest_even():
    # every bfloat16 in [1, 2), and float32 values a quarter, a half and three quarters of the way to the next
    low = 1 + torch.arange(128) / 128
    exact = torch.stack([low + part / 512 for part in range(4)])
    z = torch.zeros(1, 512, dtype=torch.bfloat16, device=DEVICE)
    x = affine_fwd(z, None, None, exact.to(DEVICE), torch.arange(4, device=DEVICE), 128)
    assert torch.equal(x.cpu().view(4, 128), exact.to(torch.bfloat16))


@pytest.mark.parametrize("a", [1e-4, 1e-3, 1.9e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("descriptors", [False, True])
def test_small_scales_in_bfloat16(a, descriptors):
    """The delta form's change of y has the right size at any a; the prologue form's is nothing below 2^-9."""
    T, N, D = 64, 64, 32
    generator = torch.Generator().manual_seed(0)
    z, weight = (torch.randn(n, 4 * D, generator=generator).bfloat16() for n in (T, N))
    # the plain product of the last two heads cancels: what is left is the change, before it is added to anything large
    z[:, 3 * D :], weight[:, 3 * D :] = z[:, 2 * D : 3 * D], -weight[:, 2 * D : 3 * D]
    weight[:, : 2 * D] = 0
    scale, heads = torch.full((1, D), a), torch.tensor([2], device=DEVICE)
    exact = a * z[:, 2 * D : 3 * D].double() @ weight[:, 2 * D : 3 * D].double().T
    tile = Tile(4, 2, {"BLOCK_T": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SLICES": 2})
    gains = {}
    for form in (delta_linear, prologue_linear):
        args = (z.to(DEVICE), weight.to(DEVICE), None, scale.to(DEVICE), heads, D)
        y = form(*args, tile=tile, descriptors=descriptors).cpu().double()
        gains[form] = ((y * exact).sum() / (exact**2).sum()).item()
    assert gains[delta_linear] == pytest.approx(1, abs=0.01)
    assert abs(gains[prologue_linear]) < 0.01 if a < 2**-9 else gains[prologue_linear] == pytest.approx(1, abs=0.3)
