"""The kernels' machine code on every architecture, compiled ahead of time in processes that do not interpret."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from benchmarks.proof.machine_code import Row, problems
from lofit_kernels.gpu.tiles import ARCHITECTURES, SERIALISED_BEFORE, SHARED_MEMORY, TABLE, every_tile

pytest.importorskip("triton")

GREEN = Row("_kernel", "case", "sm_90", "T=32 w4 s1", "bfloat16", 128, "0", registers=64, loads={"16": 4})


def compiled(kernel: str, arch: str) -> bool:
    """Whether there is a tile, and the installed Triton's ptxas does not serialise the kernel."""
    release = tuple(int(part) for part in version("triton").split(".")[:2])
    return bool(every_tile(kernel, arch)) and release >= SERIALISED_BEFORE.get(kernel, {}).get(arch, (0, 0))


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


# 80, which is no power of 2, is compiled with every mask; slow: 128 too, and every architecture
@pytest.mark.parametrize(
    "archs, more",
    [
        (("sm_90",), ("--head-dim", "80", "--jobs", "1")),
        pytest.param(ARCHITECTURES, (), marks=pytest.mark.slow),
    ],
    ids=["one", "all"],
)
def test_machine_code_of_every_kernel_is_green(archs, more, tmp_path):
    report = tmp_path / "rows.json"
    done = python("-m", "benchmarks.proof.machine_code", "--sample", "--arch", *archs, *more, "--json", str(report))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads(report.read_text())
    assert [row["problems"] for row in rows if "problems" in row] == []
    seen = {(row["kernel"][1:].removesuffix("_kernel") + "_tma" * ("bulk_loads" in row), row["arch"]) for row in rows}
    sixteen_bits = {kernel for kernel in TABLE if not kernel.endswith("_float32")}
    assert seen == {(kernel, arch) for kernel in sixteen_bits for arch in archs if compiled(kernel, arch)}
    for row in rows:
        assert row["spills"] == 0 and 0 < row["registers"] <= 255
        assert row["shared"] <= SHARED_MEMORY[row["arch"]]
        assert {"kernel", "arch", "tile", "dtype", "triton", "registers", "spills", "shared", "mma"} <= row.keys()
        # whatever is read in bulk is read 16 bytes at a time, or by the bulk copy engine
        assert "16" in row["loads"] or "bulk_loads" in row
        assert (row["mma"] != "-") == ("linear" in row["kernel"])
        assert row["main_loop"] > 0 or row["mma"] == "-"


PLANTED = """
import json
import sys
import torch
from benchmarks.proof.machine_code import read
from benchmarks.proof import catalogue
from lofit_kernels.gpu import affine, offset

def case(call):
    return catalogue.specialise(catalogue.Case("planted", call), arch, torch.bfloat16, 128)[0]

found = {}
for arch in ("sm_90", "gfx942"):
    odd = torch.empty(64, 257, dtype=torch.bfloat16)
    found[arch, "narrow"] = read(case(lambda i: offset.column_sum(odd))).problems
    options = affine.head_options
    affine.head_options = lambda *of: {**options(*of), "BLOCK_T": 64, "num_warps": 1, "num_stages": 1}
    found[arch, "spills"] = read(case(lambda i: i.backward(True, True, True))).problems
    affine.head_options = options
    broken = case(lambda i: i.backward(True, True, True))
    del broken.constexprs[min(broken.constexprs)]
    found[arch, "error"] = read(broken).problems
print(json.dumps([[*key, value] for key, value in found.items()]))
"""


@pytest.mark.slow
def test_machine_code_planted_defects_are_seen():
    done = python("-c", PLANTED)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {(arch, kind): text for arch, kind, text in json.loads(done.stdout.splitlines()[-1])}
    for arch in ("sm_90", "gfx942"):
        assert any("loads of 2 bytes" in text for text in found[arch, "narrow"])
        assert any(text.startswith("spills") for text in found[arch, "spills"])
        assert found[arch, "error"]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, []),
        ({"spills": 16}, ["spills 16"]),
        ({"shared": 232449}, ["shared memory 232449 of 232448 bytes"]),
        ({"arch": "gfx942", "shared": 65537}, ["shared memory 65537 of 65536 bytes"]),
        ({"tensor_memory": 576}, ["tensor memory 576 of 512 columns"]),
        ({"needs_mma": True}, ["no matrix instruction"]),
        ({"needs_mma": True, "mma": "wgmma"}, []),
        ({"needs_bulk": True}, ["no bulk loads"]),
        ({"needs_bulk": True, "bulk_loads": 2}, []),
        ({"loads": {"2": 3, "16": 1}}, ["3 loads of 2 bytes"]),
        ({"loads": {"2": 3}, "may_load_narrow": True}, []),
        ({"loads": {"2": 3}, "D": 20}, []),
        ({"registers": 0}, ["no code: the binary is empty"]),
        ({"warnings": ["(C7515) serialised"]}, ["(C7515) serialised"]),
        ({"error": "CompilationError: x"}, ["CompilationError: x"]),
    ],
)
def test_machine_code_budgets(change, expected):
    assert problems(dataclasses.replace(GREEN, **change)) == expected


@pytest.mark.slow
def test_machine_code_refuses_a_process_that_interprets():
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'; import triton, benchmarks.proof.machine_code as m; m.main([])"
    )
    done = python("-c", code)
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr
