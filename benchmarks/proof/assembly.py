"""Reading PTX and amdgcn text: which matrix instruction, how wide the loads are, how long the main loop is."""

from __future__ import annotations

import re
from collections import Counter

# the first that is there names the kernel's matrix instruction
_MMA = (
    ("tcgen05", re.compile(r"\btcgen05\.mma")),
    # operand A from registers: its list follows the accumulator's
    ("wgmma RS", re.compile(r"\bwgmma\.mma_async[^;]*?\{[^}]*\}\s*,\s*\{")),
    ("wgmma SS", re.compile(r"\bwgmma\.mma_async")),
    ("mma.sync", re.compile(r"\bmma\.sync")),
    ("mfma", re.compile(r"\bv_mfma_")),
)
_PTX_LOAD = re.compile(r"\bld\.global(?:\.[a-zA-Z0-9_:]+)*?(?:\.v(\d))?\.[busf](\d+)\s")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^\n\[]*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)")
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\.tensor\.\dd\.shared")
_GCN_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
_GCN_BYTES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2}
_LABEL = re.compile(r"^\s*([$.\w]+):")
_BRANCH = re.compile(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+([$.\w]+)")
_INSTRUCTION = re.compile(r"^\s+(?:@!?%\w+\s+)?[a-z][\w.:]*\b")


def mma_kind(assembly: str) -> str:
    """ "tcgen05", "wgmma SS" / "RS" (operand A in shared memory / registers), "mma.sync", "mfma", or "-"."""
    return next((name for name, pattern in _MMA if pattern.search(assembly)), "-")


def load_widths(assembly: str, arch: str) -> dict[str, int]:
    """Global load instructions in PTX or amdgcn text, counted by their width in bytes."""
    widths: Counter[int] = Counter()
    if arch.startswith("sm_"):
        for vector, bits in _PTX_LOAD.findall(assembly):
            widths[int(vector or 1) * int(bits) // 8] += 1
        for size in _PTX_COPY.findall(assembly):
            widths[int(size, 0)] += 1
    else:
        for kind in _GCN_LOAD.findall(assembly):
            words = re.match(r"dwordx?(\d?)", kind)
            narrow = next((size for name, size in _GCN_BYTES.items() if kind.startswith(name)), 0)
            widths[4 * int(words[1] or 1) if words else narrow] += 1
    return {str(width): widths[width] for width in sorted(widths)}


def bulk_loads(assembly: str) -> int:
    """Loads of whole tiles by the bulk copy engine."""
    return len(_PTX_BULK.findall(assembly))


def main_loop(assembly: str) -> int:
    """Instructions in the main loop: of the innermost loops with a matrix instruction, or else of all, the longest.

    Counted in the text, before ptxas schedules it: comparable between tiles of one architecture. 0 without a loop.
    """
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            loops.append((labels[branch[1]], number))
    innermost = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    bodies = ["\n".join(lines[a : b + 1]) for a, b in innermost]
    multiplying = [body for body in bodies if mma_kind(body) != "-"]
    lengths = [sum(bool(_INSTRUCTION.match(line)) for line in body.splitlines()) for body in multiplying or bodies]
    return max(lengths, default=0)
