"""64-bit addresses: rows that are far apart in memory, and the offsets in the compiled IR."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from lofit_kernels.gpu.jit import recording

# what is small whatever the model: a number per head, per element of a head, or per output
LISTS = {"scale", "offset", "scale_heads", "offset_heads", "heads", "bias", "addend", "gain", "layers", "slots"}
SMALL = LISTS | {"column_sum", "out", "first", "second"}
GROUPED = {"_grouped_fold_kernel", "_grouped_bwd_kernel"}
COMPILE = """
import json
import triton
from lofit_kernels.gpu.catalogue import catalogue, target
found = {}
for one in catalogue(sample=True, architectures=["sm_80"]):
    if one.name not in found:
        source = triton.compiler.ASTSource(one.kernel, one.signature, one.constexprs, one.attrs)
        found[one.name] = triton.compile(source, target=target("sm_80"), options=one.options).asm["ttir"]
print(json.dumps(found))
"""
POINTER = re.compile(r"(%[\w#]+) = tt\.(addptr|splat|broadcast|expand_dims) (%[\w#]+)(?:, %[\w#]+)? : (.*)")
ACCESS = re.compile(r"tt\.(?:load|store) (%[\w#]+)")


def offsets(ttir: str) -> dict[str, set[bool]]:
    """Tensor -> for each of its loads and stores, whether a 64-bit offset is part of the address."""
    wide: dict[str, tuple[str, bool]] = {}
    found: dict[str, set[bool]] = {}
    for line in ttir.splitlines():
        step = POINTER.search(line)
        if step and "!tt.ptr" in step[4]:
            root, known = wide.get(step[3], (step[3], False))
            grown = step[2] == "addptr" and re.search(r"\bi64|xi64", step[4].split(" loc(")[0].rsplit(", ", 1)[1])
            wide[step[1]] = (root, known or bool(grown))
        access = ACCESS.search(line)
        if access:
            root, known = wide[access[1]]
            found.setdefault(root.lstrip("%"), set()).add(known)
    return found


def test_row_addresses_are_64_bit_in_the_ir():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {name: offsets(ttir) for name, ttir in json.loads(done.stdout.splitlines()[-1]).items()}
    large = {(kernel, tensor): wide for kernel, by in compiled.items() for tensor, wide in by.items()}
    # grouped kernels read addresses from a table: of W, whose rows are far apart, and of v and the heads
    from_table = {place: large.pop(place) for place in list(large) if place[1].startswith("address")}
    assert {kernel for (kernel, _), wide in from_table.items() if wide == {True}} == GROUPED
    large = {place: wide for place, wide in large.items() if place[1] not in SMALL}
    assert len({kernel for kernel, _ in large} | GROUPED) == len(compiled) >= 10
    assert {place for place, wide in large.items() if wide != {True}} == set()


def test_offsets_sees_a_narrow_address():
    ttir = """
      %1 = arith.muli %rows, %stride : tensor<32x1xi32>
      %2 = tt.splat %z : !tt.ptr<bf16> -> tensor<32x1x!tt.ptr<bf16>> loc(#loc1)
      %3 = tt.addptr %2, %1 : tensor<32x1x!tt.ptr<bf16>>, tensor<32x1xi32> loc(#loc1)
      %4 = tt.load %3, %m, %c : tensor<32x1x!tt.ptr<bf16>>
      %5 = tt.addptr %x, %6 : !tt.ptr<bf16>, i64 loc(#loc1)
      tt.store %5, %4 : !tt.ptr<bf16>
    """
    assert offsets(ttir) == {"z": {False}, "x": {True}}


@pytest.mark.parametrize("stride, copied", [(2**23 - 8, False), (2**30, True), (2**31, True)])
def test_rows_that_a_tile_cannot_span_are_copied(device, stride, copied):
    from lofit_kernels.gpu.forward import delta_linear

    # never read: the launch is only noted
    z = torch.empty_strided((3, 32), (stride, 1), dtype=torch.float16, device="meta")
    weight, a = torch.empty(8, 32, dtype=torch.float16, device="meta"), torch.empty(1, 16, device="meta")
    with recording("sm_80") as recorded:
        delta_linear(z, weight, None, a, torch.empty(1, dtype=torch.int64, device="meta"), 16)
    assert (recorded.launches[0][1][0] is z) != copied
