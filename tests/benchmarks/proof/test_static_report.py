"""The machine-code proof as files."""

import json

from benchmarks.proof.static_report import left_out, markdown, rows_as_json
from lofit_kernels.gpu.tiles import ARCHITECTURES, TABLE, every_tile

ROW = {
    "kernel": "_delta_linear_kernel",
    "arch": "sm_90",
    "tile": "64x128 w4 s3",
    "dtype": "bfloat16",
    "triton": "3.7.1",
    "registers": 100,
    "spills": 0,
    "shared": 1024,
    "tensor_memory": 0,
    "mma": "wgmma SS",
    "main_loop": 30,
    "loads": {"16": 4},
}


def test_rows_as_json_is_a_list_with_a_row_to_a_line():
    text = rows_as_json([ROW, ROW])
    assert json.loads(text) == [ROW, ROW]
    assert len(text.splitlines()) == 4


def test_left_out_has_a_reason_for_every_missing_tile():
    reasons = {(row["kernel"], row["arch"]): row["reason"] for row in left_out()}
    missing = {(kernel, arch) for kernel in TABLE for arch in ARCHITECTURES if not every_tile(kernel, arch)}
    assert missing and missing <= reasons.keys()


def test_markdown_shows_the_worst_row_of_a_tile_and_counts_the_red():
    worse = {**ROW, "registers": 255, "shared": 4096, "loads": {"4": 1, "16": 2}, "problems": ["spills 8"]}
    page = markdown([ROW, worse], [])
    assert "2 specialisations, 1 red" in page
    line = next(line for line in page.splitlines() if "`_delta_linear_kernel`" in line)
    assert "| 2 | 255 | 0 | 4096 | 0 | wgmma SS | 30 | 4Bx1 16Bx4 |" in line
