"""Compiles every kernel for every architecture, without a GPU, and reads what came out.

    python -m benchmarks.proof.machine_code [--sample] [--arch sm_90 ...] [--kernel NAME ...] [--json FILE]

A row is one specialisation (kernel, flags, tile, dtype, architecture). It is red when it spills, asks for more shared
memory or tensor memory than the chip has, loads single 16-bit values where 16 bytes were aligned and contiguous, misses
the matrix units it is meant for, or came out empty. The exit status is 1 when any row is red.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

from benchmarks.proof.assembly import bulk_loads, load_widths, main_loop, mma_kind
from benchmarks.proof.static_report import rows_as_json
from lofit_kernels.gpu.tiles import ARCHITECTURES, SHARED_MEMORY

TENSOR_MEMORY_COLUMNS = 512
DTYPES = ("bfloat16", "float16", "float32")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass
class Row:
    """What one specialisation compiled to. `spills` is bytes (on gfx942 registers and bytes together)."""

    kernel: str
    case: str
    arch: str
    tile: str
    dtype: str
    D: int
    triton: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    mma: str = "-"
    # instructions of PTX or amdgcn text in the innermost loop
    main_loop: int = 0
    # how many load instructions of each width in bytes
    loads: dict[str, int] = field(default_factory=dict)
    # how many loads of whole tiles by the bulk copy engine
    bulk_loads: int = 0
    warnings: list[str] = field(default_factory=list)
    needs_mma: bool = False
    needs_bulk: bool = False
    may_load_narrow: bool = False
    error: str = ""
    problems: list[str] = field(default_factory=list)


def problems(row: Row) -> list[str]:
    """What is wrong with `row`; empty when it is green."""
    if row.error:
        return [row.error]
    found = []
    if row.registers == 0:
        found.append("no code: the binary is empty")
    if row.spills:
        found.append(f"spills {row.spills}")
    if row.shared > SHARED_MEMORY[row.arch]:
        found.append(f"shared memory {row.shared} of {SHARED_MEMORY[row.arch]} bytes")
    if row.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"tensor memory {row.tensor_memory} of {TENSOR_MEMORY_COLUMNS} columns")
    if row.needs_mma and row.mma == "-":
        found.append("no matrix instruction")
    if row.needs_bulk and row.bulk_loads == 0:
        found.append("no bulk loads")
    narrow = sum(count for width, count in row.loads.items() if int(width) <= 2)
    if narrow and not row.may_load_narrow and row.D % 8 == 0:
        found.append(f"{narrow} loads of 2 bytes")
    return found + row.warnings


def told(row: Row) -> dict[str, Any]:
    """A row as JSON has it: what it was compiled for is left out, and so is what there is nothing of."""
    of_compiler = ("needs_mma", "needs_bulk", "may_load_narrow")
    silent = {name for name in ("warnings", "error", "problems", "bulk_loads") if not getattr(row, name)}
    return {name: value for name, value in asdict(row).items() if name not in silent and name not in of_compiler}


def _nvidia(row: Row, compiled: Any) -> None:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = os.path.join(folder, "kernel.cubin")
        with open(binary, "wb") as file:
            file.write(compiled.asm["cubin"])
        dump = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary]
        listed = _RESOURCES.search(subprocess.run(dump, capture_output=True, text=True, check=True).stdout)
        if listed:
            row.registers = int(listed[1])
            # no kernel keeps an array on the stack: a stack frame is spilled registers
            row.spills = int(listed[2]) + int(listed[3])
        if row.mma != "-":
            row.warnings = _ptxas_warnings(compiled.asm["ptx"], row.arch, folder)


def _ptxas_warnings(ptx: str, arch: str, folder: str) -> list[str]:
    """What ptxas says about serialised matrix instructions: only its log tells, so it runs once more."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    capability = int(arch[3:])
    source = os.path.join(folder, "kernel.ptx")
    with open(source, "w") as file:
        file.write(ptx)
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", source, "-o"]
    log = subprocess.run([*command, os.path.join(folder, "kernel.o")], capture_output=True, text=True).stderr
    return sorted({match[0] for match in re.finditer(r"\(C75\d\d\)[^\n]*", log)})


def _amd(row: Row, compiled: Any) -> None:
    text = compiled.asm["amdgcn"]

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    row.registers = value("vgpr_count")
    row.spills = value("vgpr_spill_count") + value("sgpr_spill_count") + value("private_segment_fixed_size")


def read(found: Any) -> Row:
    """Compiles a `catalogue.Specialisation` (or takes it from Triton's cache) and reads its machine code."""
    import triton

    from benchmarks.proof.catalogue import target

    dtype = str(found.dtype).removeprefix("torch.")
    row = Row(found.name, found.case.name, found.arch, found.tile, dtype, found.D, triton.__version__)
    row.needs_mma = found.is_product and found.dtype.itemsize == 2
    row.needs_bulk = row.needs_mma and found.case.tiles.endswith("_tma")
    row.may_load_narrow = found.case.narrow
    try:
        source = triton.compiler.ASTSource(found.kernel, found.signature, found.constexprs, found.attrs)
        compiled = triton.compile(source, target=target(found.arch), options=found.options)
    except Exception as failure:
        # a kernel that does not compile is a red row, not the end of the report
        row.error = f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1] if str(failure) else ''}"
        row.problems = problems(row)
        return row
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    row.shared = compiled.metadata.shared
    row.tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    row.mma, row.main_loop = mma_kind(assembly), main_loop(assembly)
    row.loads, row.bulk_loads = load_widths(assembly, row.arch), bulk_loads(assembly)
    (_nvidia if "ptx" in compiled.asm else _amd)(row, compiled)
    row.problems = problems(row)
    return row


def _read_item(item: tuple[str, str, str, int, int]) -> Row:
    """`read` in a worker process: kernels do not travel between processes, their place in the catalogue does."""
    import torch

    from benchmarks.proof.catalogue import CASES, specialise

    name, arch, dtype, D, launch = item
    case = next(case for case in CASES if case.name == name)
    return read(specialise(case, arch, getattr(torch, dtype), D)[launch])


def read_catalogue(
    sample: bool,
    architectures: Sequence[str],
    kernels: Sequence[str],
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    jobs: int,
) -> list[Row]:
    """One row for each specialisation of the catalogue, in its order, with a progress bar on stderr.

    An empty `kernels` or `head_dims` is every one. A single job is this process.
    """
    from rich.console import Console
    from rich.progress import track

    from benchmarks.proof.catalogue import catalogue

    items = [
        (found.case.name, found.arch, str(found.dtype).removeprefix("torch."), found.D, found.launch)
        for found in catalogue(sample, architectures)
        if not kernels or any(name in found.name for name in kernels)
        if str(found.dtype).removeprefix("torch.") in dtypes
        if not head_dims or found.D in head_dims
    ]
    console = Console(stderr=True)
    if jobs == 1:
        return [_read_item(item) for item in track(items, "compiling", console=console, transient=True)]
    rows: dict[int, Row] = {}
    # spawn: a fork after torch has started its threads may hang
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_read_item, item): number for number, item in enumerate(items)}
        waiting = as_completed(pending)
        for done in track(waiting, "compiling", len(pending), console=console, transient=True):
            rows[pending[done]] = done.result()
    return [rows[number] for number in range(len(items))]


def show(rows: Iterable[Row]) -> None:
    """Prints the table, red rows with what is wrong with them."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "case", "arch", "tile", "dtype", "D", "regs", "spills", "shared", "mma", "loads", "verdict")
    for row in rows:
        loads = " ".join(f"{width}Bx{count}" for width, count in row.loads.items())
        loads += f" bulk x{row.bulk_loads}" if row.bulk_loads else ""
        numbers = (str(row.registers), str(row.spills), str(row.shared), row.mma, loads)
        verdict = "[red]" + "; ".join(row.problems) if row.problems else "[green]ok"
        table.add_row(row.kernel, row.case, row.arch, row.tile, row.dtype, str(row.D), *numbers, verdict)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.proof.machine_code", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="a few specialisations that cover every kernel")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="ARCH")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only kernels whose name contains NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[], metavar="D", help="only these (default: all)")
    parser.add_argument("--summary", action="store_true", help="print the red rows only")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    chosen = parser.parse_args(arguments)
    # Triton decides at import whether to interpret: too late if it is already there
    if os.environ.pop("TRITON_INTERPRET", None) and "triton" in sys.modules:
        parser.error("Triton was imported with TRITON_INTERPRET set; kernels cannot be compiled in this process")
    rows = read_catalogue(chosen.sample, chosen.arch, chosen.kernel, chosen.dtype, chosen.head_dim, chosen.jobs)
    show([row for row in rows if row.problems] if chosen.summary else rows)
    red = [row for row in rows if row.problems]
    print(f"{len(rows)} specialisations, {len(red)} red")
    if chosen.json:
        with open(chosen.json, "w") as file:
            file.write(rows_as_json(map(told, rows)))
    return 1 if red or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
