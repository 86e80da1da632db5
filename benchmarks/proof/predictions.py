"""What the output projections of real models should cost: bytes, operations and a roofline's time, by every path.

    python -m benchmarks.proof.predictions [--device H100 ...] [--tokens 4096] [--top 0.1] [--json]

The counts are exact and the same on every device. The times are predictions: no clock is involved, and no GPU needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lofit_kernels import roofline
from lofit_kernels.dispatch import plan
from lofit_kernels.roofline import DEVICES, PATHS, Shape
from lofit_kernels.shapes import SHAPES

EVIDENCE = "prediction (roofline), not a measurement"
PREDICTED = {name: shape for name, shape in SHAPES.items() if name != "toy"}
# the paths of each step that are worth a column
STEP_PATHS = {
    "select": ("hook", "compiled hook", "pass", "delta", "fused delta", "prologue"),
    "tune": ("hook", "compiled hook", "fold"),
}


def roofline_rows(
    devices: Sequence[str], *, tokens: int, dtype: torch.dtype = torch.bfloat16, top: float = 0.1
) -> list[dict]:
    """Counts and predictions of one projection of every model on every device, by every path of both steps.

    devices: names in `roofline.DEVICES`. Step "select" scales all heads, step "tune" shifts the share `top` of them (at
    least one). `chosen` marks the path that `plan` takes where nothing was measured. Raises ValueError for an unknown
    device or a top out of (0, 1].
    """
    if not 0 < top <= 1:
        raise ValueError(f"expected a share of heads in (0, 1], got {top}")
    if unknown := [name for name in devices if name not in DEVICES]:
        raise ValueError(f"unknown device {unknown[0]!r}: expected one of {', '.join(DEVICES)}")
    rows = []
    for name in devices:
        for model, layer in PREDICTED.items():
            shifted = max(1, round(top * layer.H))
            for step, heads in (("select", {"n_scale": layer.H}), ("tune", {"n_offset": shifted})):
                sizes = {"itemsize": dtype.itemsize, "layers": layer.layers}
                shape = Shape(tokens, layer.N, layer.H, layer.D, **heads, **sizes)
                chosen = plan(has_scale=step == "select", many_heads=step == "select", dtype=dtype, device_type="cuda")
                for path in ("floor", *STEP_PATHS[step]):
                    seen = asdict(roofline.predict(PATHS[path], shape, DEVICES[name]))
                    taken = PATHS[path] == (chosen.forward, chosen.backward)
                    rows.append({"device": name, "model": model, "step": step, "path": path, **seen, "chosen": taken})
    return rows


def main(
    device: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(DEVICES)}; may be repeated. Default: all.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-T", help="Tokens per forward pass.", min=1)] = 4096,
    top: Annotated[float, typer.Option(help="Share of heads that step 2 shifts.")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Bytes, operations and predicted time of every path for real models' projections. No clock is involved."""
    names = device or list(DEVICES)
    try:
        rows = roofline_rows(names, tokens=tokens, top=top)
    except ValueError as refused:
        raise typer.BadParameter(str(refused)) from refused
    assumed = {name: asdict(DEVICES[name]) for name in names}
    report = {"evidence": EVIDENCE, "tokens": tokens, "top": top, "devices": assumed, "rows": rows}
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _show(report: dict) -> None:
    console, rows = Console(), report["rows"]
    cells = {(row["device"], row["step"], row["model"], row["path"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    steps = {"select": "step 1, scales on all heads", "tune": f"step 2, offsets on {report['top']:.0%} of the heads"}
    for step, title in steps.items():
        paths = list(dict.fromkeys(row["path"] for row in rows if row["step"] == step))
        for device in report["devices"]:
            found = {model: [cells[device, step, model, path] for path in paths] for model in models}
            table = _path_table(paths[1:], "plan", title=f"{device}, {title}: time to the floor's")
            for model, row in found.items():
                chosen = ", ".join(cell["path"] for cell in row if cell["chosen"])
                table.add_row(model, *(f"{cell['ratio']:.2f}" for cell in row[1:]), chosen)
            console.print(table)
        # the counts are the same on every device
        table = _path_table(paths, "10^9 flop", title=f"{title}: MB moved, operations (exact counts)")
        for model, row in found.items():
            moved = (f"{(cell['forward_bytes'] + cell['backward_bytes']) / 1e6:.0f}" for cell in row)
            flops = dict.fromkeys(f"{cell['flops'] / 1e9:.0f}" for cell in row)
            table.add_row(model, *moved, ", ".join(flops))
        console.print(table)
    console.print(
        f"One output projection, forward and backward, {report['tokens']} tokens, bfloat16. Floor: the frozen "
        f"projection. Of two numbers of operations the second is delta's. Ratios: {report['evidence']}.",
        highlight=False,
    )


def _path_table(paths: list[str], last: str, title: str) -> Table:
    table = Table(title=title, box=SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    for path in paths:
        # a line per word keeps the columns of numbers narrow
        table.add_column(path.replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column(last, no_wrap=True)
    return table


if __name__ == "__main__":
    typer.run(main)
