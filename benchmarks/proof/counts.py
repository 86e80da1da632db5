"""What one adapted projection costs in things that can be counted: launches, bytes moved, bytes saved for backward.

    python -m benchmarks.proof.counts [--model Llama-3.2-1B] [--tokens 512] [--no-compile] [--markdown FILE]

Exact, the same on every machine, no GPU needed. `benchmarks.proof.traffic` says how launches and bytes are counted. The
compiled hook's are Inductor's own figures for the code it generates for the CPU, and are labelled so.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.proof.traffic import Traffic, counted
from benchmarks.speed.op.operators import OPERATORS, SETTINGS, Operator, Projection, ours, projection, step
from lofit_kernels.shapes import SHAPES, LayerShape

ARCH = "sm_90"
# what dispatch chooses where the sweeps are Triton's
ON_GPU = Operator("ours, on a GPU", partial(ours, backend="triton"), True)
INDUCTOR = "compiled_hook"


@dataclass(frozen=True)
class Count:
    """One row. bytes: moved by everything that is no GEMM; saved: kept for backward beyond attention and the weights,
    under sdpa and under eager attention. per_element: of z, (T, K)."""

    setting: str
    peer: str
    launches: int
    gemms: int
    bytes: int
    saved_sdpa: int
    saved_eager: int
    elements: int
    source: str

    @property
    def bytes_per_element(self) -> float:
        """Bytes moved per element of z."""
        return self.bytes / self.elements


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by PyTorch's fused kernel. q, k, v: (1, H, T, D). Returns z (T, K), as models hand it over."""
    return _z(scaled_dot_product_attention(q, k, v, is_causal=True))


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written out. q, k, v: (1, H, T, D). Returns z (T, K), as models hand it over."""
    return _z(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


def _z(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous().flatten(0, 1).flatten(1)


def saved_storages(run: Callable[[], Tensor]) -> dict[int, Tensor]:
    """Every storage that the graph of `run` keeps for backward, once: its address -> a tensor in it, kept alive."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        # the graph must live until everything is counted, or a freed address could be handed out again
        y = run()
    return saved if y.requires_grad else {}


def saved_bytes(operator: Operator, p: Projection, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
    """Bytes kept for backward by attention and the adapted projection, less those of attention and the frozen one.

    Each storage once; the weight, the vectors and the lists of heads, which exist anyway, not at all.
    """
    generator = torch.Generator().manual_seed(1)
    # as models lay them out, and as their rotary embedding leaves them: heads inside tokens
    size = (1, len(p.z), p.shape.H, p.shape.D)
    qkv = [torch.randn(size, generator=generator).to(p.z.dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    constants = [p.weight, p.scale_heads, p.offset_heads, *p.parameters]
    known = {x.untyped_storage().data_ptr() for x in constants if x is not None}

    def total(row: Operator) -> int:
        found = saved_storages(lambda: row.forward(attention(*qkv), p))
        return sum(x.untyped_storage().nbytes() for at, x in found.items() if at not in known)

    return total(operator) - total(OPERATORS["floor"])


def traffic(operator: Operator, p: Projection) -> Traffic:
    """Launches and bytes of one forward and backward."""
    with counted(ARCH) as found:
        step(operator, p)
    return found


def inductor_traffic(operator: Operator, p: Projection) -> Traffic:
    """Inductor's own figures for the kernels it generates for one forward and backward on this device."""
    from torch._functorch import config as functorch
    from torch._inductor import config, metrics
    from torch._inductor.compile_fx import inductor_metrics_log

    level, propagate = inductor_metrics_log.level, inductor_metrics_log.propagate
    silent = logging.NullHandler()
    inductor_metrics_log.addHandler(silent)
    # only counts what it logs
    inductor_metrics_log.setLevel(logging.INFO)
    inductor_metrics_log.propagate = False
    torch._dynamo.reset()
    metrics.reset()
    try:
        # a graph from the cache would not be counted; compiled C++ may come from there
        with config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            step(operator, p)
        external = [node.is_extern() for node, _ in metrics.nodes_num_elem]
        # Inductor notes bytes in units of four
        moved = sum(4 * words for (_, words), gemm in zip(metrics.nodes_num_elem, external, strict=True) if not gemm)
        return Traffic(metrics.generated_kernel_count + sum(external), sum(external), moved)
    finally:
        inductor_metrics_log.setLevel(level)
        inductor_metrics_log.propagate = propagate
        inductor_metrics_log.removeHandler(silent)
        torch._dynamo.reset()


def count(operator: Operator, p: Projection) -> Count:
    """The row of one operator on one projection. Paths on Triton are counted where they cannot run, too."""
    from lofit_kernels.gpu.launch import recording

    if operator.name == INDUCTOR:
        found, source = inductor_traffic(operator, p), "Inductor, CPU"
    else:
        found, source = traffic(operator, p), "exact"
    saved = []
    for attention in (sdpa, eager):
        with recording(ARCH):
            saved.append(saved_bytes(operator, p, attention))
    return Count(p.setting, operator.name, found.launches, found.gemms, found.bytes, *saved, p.z.numel(), source)


def counts(shape: LayerShape, T: int, dtype: torch.dtype = torch.bfloat16, compiled: bool = True) -> list[Count | str]:
    """Every peer in every setting: a Count, or a line that says why there is none."""
    rows: list[Count | str] = []
    for setting in SETTINGS:
        p = projection(setting, shape, T, dtype, "cpu")
        for operator in (OPERATORS["floor"], OPERATORS["ours"], ON_GPU, *list(OPERATORS.values())[2:]):
            why = operator.missing(p) if operator.needs == "compiler" else operator.refusal(p)
            if operator.name == INDUCTOR and not compiled:
                why = "left out by --no-compile"
            rows.append(f"{setting}, {operator.name}: {why}" if why else count(operator, p))
    return rows


_HEADER = (
    "setting",
    "peer",
    "launches",
    "of them GEMMs",
    "bytes moved / element of z",
    "saved, sdpa",
    "saved, eager",
)


def _saved(count: Count, saved: int, itemsize: int) -> str:
    elements = saved / itemsize / count.elements
    return "0" if saved == 0 else f"{elements:.2f} T*K" if elements >= 0.01 else f"{saved} B"


def table(rows: Sequence[Count | str], dtype: torch.dtype) -> list[list[str]]:
    """The counts as cells, under _HEADER."""
    return [
        [
            row.setting,
            row.peer + ("" if row.source == "exact" else f" ({row.source})"),
            str(row.launches),
            str(row.gemms),
            f"{row.bytes_per_element:.2f}",
            _saved(row, row.saved_sdpa, dtype.itemsize),
            _saved(row, row.saved_eager, dtype.itemsize),
        ]
        for row in rows
        if isinstance(row, Count)
    ]


def markdown(rows: Sequence[Count | str], dtype: torch.dtype) -> str:
    """The counts as a Markdown table, and what has no count."""
    cells = [list(_HEADER), ["---"] * len(_HEADER), *table(rows, dtype)]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    absent = [f"* {row}" for row in rows if isinstance(row, str)]
    return "\n".join([*lines, "", "Without a count:", "", *absent]) + "\n"


def plain(rows: Sequence[Count | str], dtype: torch.dtype) -> str:
    """The counts as a table for a terminal."""
    cells = [list(_HEADER), *table(rows, dtype)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, *(f"- {row}" for row in rows if isinstance(row, str))])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.proof.counts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="Llama-3.2-1B")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled hook out")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    chosen = parser.parse_args(arguments)
    shape, dtype = SHAPES[chosen.model], torch.bfloat16
    rows = counts(shape, chosen.tokens, dtype, compiled=not chosen.no_compile)
    print(f"{chosen.model}: T={chosen.tokens} H={shape.H} D={shape.D} K={shape.K} N={shape.N}, bfloat16, {ARCH} tiles")
    print(plain(rows, dtype))
    if chosen.markdown:
        start, end = "<!-- counts -->\n", "<!-- end of counts -->"
        text = chosen.markdown.read_text()
        if start not in text or end not in text:
            parser.error(f"{chosen.markdown} has no lines {start.strip()!r} and {end!r} to put the table between")
        head, tail = text.split(start)[0], text.split(end)[1]
        chosen.markdown.write_text(head + start + markdown(rows, dtype) + end + tail)
    return 0


if __name__ == "__main__":
    sys.exit(main())
