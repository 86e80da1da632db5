"""64-bit addresses: rows that are far apart in memory, and the offsets in the compiled IR."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from lofit_kernels.gpu.launch import recording

# what is small whatever the model: a number per head, per element of a head, or per output
LISTS = {"scale", "offset", "scale_heads", "offset_heads", "heads", "bias", "addend", "gain"}
SMALL = LISTS | {"column_sum", "out", "first", "second"}
# of many layers: the tables, and what they lead to beside the weights, which have 16 bits in the sample
SMALL |= {"layers", "slots", "reached i64", "reached f32"}
# compiled as far as the first IR, where the addresses are: what comes after takes most of the time
COMPILE = """
import json
import triton
from triton.backends.nvidia.compiler import CUDABackend
from benchmarks.proof.catalogue import catalogue, target

class Enough(Exception):
    pass

def stop(module, metadata):
    raise Enough(str(module))

def first_alone(self, stages, *rest, add_stages=CUDABackend.add_stages):
    add_stages(self, stages, *rest)
    assert list(stages)[:2] == ["ttir", "ttgir"], list(stages)
    stages["ttgir"] = stop

def first_ir(one):
    source = triton.compiler.ASTSource(one.kernel, one.signature, one.constexprs, one.attrs)
    try:
        # whole where Triton has kept it of an earlier call
        return triton.compile(source, target=target("sm_80"), options=one.options).asm["ttir"]
    except Enough as end:
        return str(end)

CUDABackend.add_stages = first_alone
found = {}
for one in catalogue(sample=True, architectures=["sm_80"]):
    if one.name not in found:
        found[one.name] = first_ir(one)
print(json.dumps(found))
"""
POINTER = re.compile(r"(%[\w#]+) = tt\.(addptr|splat|broadcast|expand_dims) (%[\w#]+)(?:, %[\w#]+)? : (.*)")
REACHED = re.compile(r"(%[\w#]+) = tt\.int_to_ptr .* -> !tt\.ptr<(\w+)>")
ACCESS = re.compile(r"tt\.(?:load|store) (%[\w#]+)")


def offsets(ttir: str) -> dict[str, set[bool]]:
    """Tensor -> for each of its loads and stores, whether a 64-bit offset is part of the address.

    A tensor whose address is read from a table is called by the type of its elements: "reached bf16".
    """
    wide: dict[str, tuple[str, bool]] = {}
    found: dict[str, set[bool]] = {}
    for line in ttir.splitlines():
        reached = REACHED.search(line)
        if reached:
            wide[reached[1]] = (f"reached {reached[2]}", False)
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
    large = {place: wide for place, wide in large.items() if place[1] not in SMALL}
    assert len({kernel for kernel, _ in large}) == len(compiled) >= 10
    assert {("_grouped_fold_kernel", "reached bf16"), ("_grouped_bwd_kernel", "reached bf16")} <= set(large)
    assert {place for place, wide in large.items() if wide != {True}} == set()


def test_offsets_sees_a_narrow_address():
    ttir = """
      %1 = arith.muli %rows, %stride : tensor<32x1xi32>
      %2 = tt.splat %z : !tt.ptr<bf16> -> tensor<32x1x!tt.ptr<bf16>> loc(#loc1)
      %3 = tt.addptr %2, %1 : tensor<32x1x!tt.ptr<bf16>>, tensor<32x1xi32> loc(#loc1)
      %4 = tt.load %3, %m, %c : tensor<32x1x!tt.ptr<bf16>>
      %5 = tt.addptr %x, %6 : !tt.ptr<bf16>, i64 loc(#loc1)
      tt.store %5, %4 : !tt.ptr<bf16>
      %7 = tt.int_to_ptr %layer {tt.divisibility = dense<16> : tensor<1xi32>} : i64 -> !tt.ptr<f16> loc(#loc1)
      %8 = tt.addptr %7, %9 : !tt.ptr<f16>, i32 loc(#loc1)
      %10 = tt.load %8 : !tt.ptr<f16>
    """
    assert offsets(ttir) == {"z": {False}, "x": {True}, "reached f16": {False}}


@pytest.mark.parametrize("stride, copied", [(2**23 - 8, False), (2**30, True), (2**31, True)])
def test_rows_that_a_tile_cannot_span_are_copied(device, stride, copied):
    from lofit_kernels.gpu.linear_forward import delta_linear

    # never read: the launch is only noted
    z = torch.empty_strided((3, 32), (stride, 1), dtype=torch.float16, device="meta")
    weight, a = torch.empty(8, 32, dtype=torch.float16, device="meta"), torch.empty(1, 16, device="meta")
    with recording("sm_80") as recorded:
        delta_linear(z, weight, None, a, torch.empty(1, dtype=torch.int64, device="meta"), 16)
    assert (recorded.launches[0][1][0] is z) != copied
