"""The tile table: every kernel has a tile on every architecture for every head_dim, and errors say what is missing."""

import subprocess
import sys

import pytest
import torch

from lofit_kernels.gpu.tiles import ARCHITECTURES, TABLE, Tile, architecture, tile


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", sorted(TABLE))
def test_tile_for_every_head_dim(kernel, arch):
    for D in (1, 20, 64, 80, 96, 128, 256, 512, 1000):
        chosen = tile(kernel, arch, D)
        assert isinstance(chosen, Tile)
        assert all(size & (size - 1) == 0 for size in chosen.blocks.values())
        options = chosen.options()
        assert options["num_warps"] in (1, 2, 4, 8) and options["num_stages"] >= 1


def test_tile_is_that_of_its_bucket():
    assert tile("affine_fwd", "sm_90", 64) is tile("affine_fwd", "sm_90", 16)
    assert tile("affine_fwd", "sm_90", 65) is tile("affine_fwd", "sm_90", 128)
    assert tile("affine_fwd", "sm_90", 128)["BLOCK_T"] < tile("affine_fwd", "sm_90", 64)["BLOCK_T"]


def test_tile_errors():
    with pytest.raises(ValueError, match="no tiles for kernel 'nothing'.*affine_fwd"):
        tile("nothing", "sm_90", 64)
    with pytest.raises(ValueError, match="no tiles for architecture 'sm_75'.*sm_80"):
        tile("affine_fwd", "sm_75", 64)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        tile("affine_fwd", "sm_90", 0)


def test_architecture_of_a_device():
    assert architecture(torch.device("cpu")) in ARCHITECTURES
    with pytest.raises(ValueError, match="'meta'"):
        architecture(torch.device("meta"))
    if torch.cuda.is_available():
        assert architecture(torch.device("cuda")) in ARCHITECTURES


def test_tiles_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lofit_kernels.gpu.tiles; assert not torch_gpu()"
    code = code.replace("torch_gpu()", "sys.modules['torch'].cuda.is_initialized()")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
