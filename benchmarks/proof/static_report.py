"""The machine-code proof as files: every row in docs/kernels/static.json, a readable table beside it.

    python -m benchmarks.proof.static_report ROWS.json ... [--output docs/kernels]

The inputs are what `python -m benchmarks.proof.machine_code --json` wrote, one per Triton version. `make aot` does all.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from lofit_fast.files import write_text
from lofit_kernels.gpu.tiles import ANY, ARCHITECTURES, LEFT_OUT, SERIALISED_BEFORE, SHARED_MEMORY, TABLE, every_tile

# the columns of a row for which nothing was compiled
_NOTHING = {"triton": "-", "registers": 0, "spills": 0, "shared": 0, "mma": "-"}
_COLUMNS = ("kernel", "load", "arch", "tile", "rows", "registers", "spills", "shared", "tmem", "MMA", "loop", "loads")

_PAGE = """\
# What the kernels compile to

Evidence: machine code, compiled ahead of time; nothing here ran. Made by `make aot`; every row is in
[static.json](static.json).

{count} specialisations, {red} red (over a budget, spilling, or without the instructions they need).

{totals}

Below, the worst value over the rows of one tile (16-bit dtypes, head sizes, flags), Triton {shown}.
*loop*: instructions of the innermost main loop in PTX or amdgcn text. *loads*: global load instructions by their width
in bytes. *tmem*: columns of tensor memory. *spills*: bytes. *SS*, *RS*: where wgmma finds operand A, shared memory or
registers. Budgets: 512 columns of tensor memory, no spills, and of shared memory:

{budgets}

{worst}

float32 rows multiply in IEEE arithmetic, for which NVIDIA's chips have no matrix instruction; they are in the JSON.

## Left out

{reasons}
"""


def rows_as_json(rows: Iterable[dict]) -> str:
    """A JSON list with a row to a line, so that a change of one shows as one."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def left_out() -> list[dict]:
    """A row with the reason for every matrix product that has no tile, or fewer than three, on an architecture."""
    rows = []
    for kernel in TABLE:
        end = next((end for end in LEFT_OUT if kernel.endswith(end)), None)
        for arch in ARCHITECTURES:
            reason = LEFT_OUT.get(end, {}).get(arch) or LEFT_OUT.get(end, {}).get(ANY)
            if reason:
                has = ", ".join(map(str, every_tile(kernel, arch))) or "none"
                rows.append(_NOTHING | {"kernel": kernel, "arch": arch, "tile": has, "reason": reason})
    for kernel, by_arch in SERIALISED_BEFORE.items():
        for arch, version in by_arch.items():
            reason = f"before Triton {'.'.join(map(str, version))} ptxas serialises it (C7515): pointers are used there"
            rows.append(_NOTHING | {"kernel": kernel, "arch": arch, "tile": "none", "reason": reason})
    return rows


def markdown(rows: Sequence[dict], missing: Sequence[dict]) -> str:
    """The page: totals, the worst values per kernel, way of loading, architecture and tile, what is left out."""
    versions = sorted({row["triton"] for row in rows})
    red = sum(bool(row.get("problems")) for row in rows)
    shown = _shown(rows)
    totals = _table(("Triton", "rows", "red", *ARCHITECTURES), (_totals(rows, version) for version in versions))
    worst = _table(_COLUMNS, _worst(row for row in rows if row["triton"] == shown and row["dtype"] != "float32"))
    reasons = _table(
        ("kernel", "arch", "tiles", "reason"), ([m["kernel"], m["arch"], m["tile"], m["reason"]] for m in missing)
    )
    budgets = _table(("architecture", *SHARED_MEMORY), [("bytes", *SHARED_MEMORY.values())])
    found = {"shown": shown, "totals": totals, "budgets": budgets, "worst": worst, "reasons": reasons}
    return _PAGE.format(count=len(rows), red=red, **found)


def _shown(rows: Sequence[dict]) -> str:
    """The version the table shows: the pinned one where it is among them."""
    import triton

    versions = sorted({row["triton"] for row in rows})
    return triton.__version__ if triton.__version__ in versions else versions[-1]


def _totals(rows: Sequence[dict], version: str) -> list[object]:
    of_version = [row for row in rows if row["triton"] == version]
    by_arch = Counter(row["arch"] for row in of_version)
    return [
        version,
        len(of_version),
        sum(bool(r.get("problems")) for r in of_version),
        *(by_arch[arch] for arch in ARCHITECTURES),
    ]


def _worst(rows: Iterable[dict]) -> Iterable[list[object]]:
    def key(row: dict) -> tuple:
        load = "descriptors" if row.get("bulk_loads") else "pointers"
        return row["kernel"], load, ARCHITECTURES.index(row["arch"]), row["tile"]

    for (kernel, load, arch, tile), group in groupby(sorted(rows, key=key), key):
        found = list(group)
        loads: Counter[int] = Counter()
        for row in found:
            loads |= Counter({int(width): count for width, count in row["loads"].items()})
        most = [max(row[name] for row in found) for name in ("registers", "spills", "shared", "tensor_memory")]
        kinds = " / ".join(sorted({row["mma"] for row in found}))
        widths = " ".join(f"{width}Bx{loads[width]}" for width in sorted(loads))
        loop = max(row["main_loop"] for row in found)
        yield [f"`{kernel}`", load, ARCHITECTURES[arch], tile, len(found), *most, kinds, loop, widths]


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def main() -> None:
    """Join the inputs, write both files, print the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("docs/kernels"))
    options = parser.parse_args()
    rows = [row for path in options.inputs for row in json.loads(path.read_text())]
    missing = left_out()
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(options.output / "static.json", rows_as_json([*rows, *missing]))
    write_text(options.output / "machine_code.md", markdown(rows, missing))
    red = sum(bool(row.get("problems")) for row in rows)
    print(f"{len(rows)} specialisations, {red} red, {len(missing)} tiles left out with a reason: {options.output}")


if __name__ == "__main__":
    main()
