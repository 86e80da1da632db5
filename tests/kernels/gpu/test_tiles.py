"""The tile table: every kernel has a tile on every architecture for every head_dim, and errors say what is missing."""

import pytest
import torch

from lofit_kernels.gpu.tiles import (
    ANY,
    ARCHITECTURES,
    LEFT_OUT,
    SERVED_BY,
    TABLE,
    Tile,
    architecture,
    every_tile,
    of_capability,
    tile,
)

PRODUCTS = ("delta_linear", "prologue_linear", "affine_linear_bwd")


def left_out(kernel, arch):
    """Why `kernel` has no tile of its own on `arch`, None where it should have one."""
    reasons = next((LEFT_OUT[end] for end in LEFT_OUT if kernel.endswith(end)), {})
    return reasons.get(arch, reasons.get(ANY))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", sorted(TABLE))
def test_tile_for_every_head_dim(kernel, arch):
    if not every_tile(kernel, arch):
        assert left_out(kernel, arch)
        with pytest.raises(ValueError, match=f"no tiles for {arch}"):
            tile(kernel, arch, 64)
        return
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


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_tiles_of_the_matrix_products(product, arch):
    for end in ("", "_tma", "_float32"):
        found = every_tile(product + end, arch)
        columns = "BLOCK_K" if product.endswith("bwd") else "BLOCK_N"
        sizes = [(row["BLOCK_T"], row[columns]) for row in found]
        assert sizes == [(64, 128), (128, 128), (128, 256)] or left_out(product + end, arch)
        assert all(row["SLICES"] in (1, 2, 4) for row in found)
        if len(found) == 3:
            picked = [tile(product + end, arch, T) for T in (1, 64, 65, 512, 513, 100_000)]
            assert picked == [row for row in found for _ in range(2)]


@pytest.mark.parametrize("version, found", [((3, 6), 0), ((3, 7), 3), ((3, 9), 3)])
def test_descriptors_are_left_out_where_triton_serialises_them(monkeypatch, version, found):
    matmul = pytest.importorskip("lofit_kernels.gpu.matmul")
    monkeypatch.setattr(matmul, "_TRITON", version)
    assert len(matmul.descriptor_tiles("prologue_linear", "sm_90")) == found
    assert len(matmul.descriptor_tiles("prologue_linear", "sm_100")) == 3
    assert len(matmul.descriptor_tiles("delta_linear", "sm_90")) == 3


@pytest.mark.parametrize(
    "capability, arch",
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_103"),
        ((11, 0), "sm_120"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "sm_120"),
    ],
)
def test_rows_of_a_compute_capability(capability, arch):
    assert of_capability(*capability) == arch in ARCHITECTURES


def test_no_rows_below_capability_8():
    with pytest.raises(ValueError, match=r"compute capability 7.5; expected 8.0"):
        of_capability(7, 5)


@pytest.mark.parametrize("arch, by", SERVED_BY.items())
def test_rows_are_shared_where_an_architecture_has_none_of_its_own(arch, by):
    assert {arch, by} <= set(ARCHITECTURES)
    for kernel in TABLE:
        if arch not in TABLE[kernel]:
            assert every_tile(kernel, arch) == every_tile(kernel, by)
    # a tile of 32 columns a step spills there
    assert tile("delta_linear", "sm_120", 1000)["BLOCK_K"] == 16 < tile("delta_linear", "sm_89", 1000)["BLOCK_K"]


def test_tile_errors():
    with pytest.raises(ValueError, match="no tiles for kernel 'nothing'.*affine_fwd"):
        tile("nothing", "sm_90", 64)
    with pytest.raises(ValueError, match="no tiles for architecture 'sm_75'.*sm_80"):
        tile("affine_fwd", "sm_75", 64)
    with pytest.raises(ValueError, match="the size must be at least 1, got 0"):
        tile("affine_fwd", "sm_90", 0)


def test_architecture_of_a_device():
    assert architecture(torch.device("cpu")) in ARCHITECTURES
    with pytest.raises(ValueError, match="'meta'"):
        architecture(torch.device("meta"))
    if torch.cuda.is_available():
        assert architecture(torch.device("cuda")) in ARCHITECTURES


def test_no_tile_has_rows_that_its_offsets_cannot_reach():
    pytest.importorskip("triton")
    from lofit_kernels.gpu.matmul import MAX_ROWS

    products = [
        row for rows in TABLE.values() for bucket in rows.values() for _, row in bucket if "SLICES" in row.blocks
    ]
    assert products and all(max(row["BLOCK_T"], row["BLOCK_N"]) <= MAX_ROWS for row in products)
