"""The commands about how the op is computed: `plan` and `autotune`."""

import json
import math
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lofit_fast.cli.command import out
from lofit_fast.cli.device_plan_report import device_report, show_device_plan
from lofit_fast.cli.options import AtLeast, Device, Dtype, Json, parse_heads

# heavy imports happen inside the commands: --help must be instant
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Alias, folder, .gguf file, hub id, or a name such as Llama-3-8B.",
        metavar="NAME",
    ),
]
# per forward pass; what is planned for does not depend on more
MOST_TOKENS = 10**9
MOST_DEVICES = 10**5
HEADS_HELP = "all, a count (32) or a fraction (0.1) of the model's heads, taken as spread evenly over its layers."


def plan(
    model: ModelName,
    tokens: Annotated[
        int,
        typer.Option("--tokens", "-T", help="Tokens per forward pass: batch x sequence.", max=MOST_TOKENS),
        AtLeast(1),
    ] = 4096,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", "-a", help="Plan for the heads of this adapter folder or hub id.", metavar="NAME"),
    ] = None,
    scale: Annotated[str | None, typer.Option(help=f"Scaled heads: {HEADS_HELP} Default: all.")] = None,
    offset: Annotated[str | None, typer.Option(help=f"Shifted heads: {HEADS_HELP}")] = None,
    device: Annotated[str, typer.Option(help="present, or A100, H100, H200, B200, MI300X.")] = "present",
    dtype: Dtype = "auto",
    devices: Annotated[
        int | None,
        typer.Option(
            help="Instead: what a training step keeps on each of so many devices, and sends.", max=MOST_DEVICES
        ),
        AtLeast(1),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="How the devices share the work: ddp (default), fsdp, tp or device-map.")
    ] = None,
    device_memory: Annotated[
        float | None, typer.Option(help="GB (10^9 bytes) of each device: says whether it fits.", metavar="GB")
    ] = None,
    as_json: Json = False,
) -> None:
    """Per layer: the path that would run, why, what it does to small scales, and its predicted cost to the floor.

    With --devices: the memory of each device and the bytes that are sent per training step, from the config alone.
    docs/scaling_out.md explains the numbers.
    """
    from lofit_fast.models import op_paths
    from lofit_fast.models.device import as_dtype, best_device, best_dtype
    from lofit_fast.patching.hub_adapters import adapter_folder

    if adapter is not None and (scale is not None or offset is not None):
        raise ValueError("expected --adapter, or --scale and --offset, got both")
    if devices is None and (mode is not None or device_memory is not None):
        raise ValueError("got no --devices, which --mode and --device-memory are about: expected how many there are")
    if devices is not None and device != op_paths.PRESENT:
        raise ValueError(f"expected --devices, or --device, got both: the latter is {device!r}")
    if device_memory is not None and not 0 < device_memory < math.inf:
        raise ValueError(f"--device-memory: got {device_memory}, expected GB above 0")
    # the devices of the table compute in bfloat16, and so do several
    here = device == op_paths.PRESENT and devices is None
    automatic = best_dtype(best_device()) if here else as_dtype("bfloat16")
    chosen = automatic if dtype == "auto" else as_dtype(dtype)
    layers = op_paths.layers_of(model)
    if adapter is not None:
        scaled, shifted = op_paths.adapter_heads(adapter_folder(adapter), layers)
    else:
        scale = "all" if scale is None and offset is None else scale
        scaled, shifted = (op_paths.spread_heads(parse_heads(text), layers) for text in (scale, offset))
    if devices is not None:
        from lofit_fast.models.device_arithmetic import plan_devices

        mode = "ddp" if mode is None else mode
        planned = plan_devices(model, mode, devices, tokens, chosen, scaled, shifted)
        report = device_report(model, mode, devices, tokens, chosen, planned, device_memory)
        print(json.dumps(report)) if as_json else show_device_plan(report)
        return
    rows = op_paths.plan_layers(layers, scaled, shifted, tokens=tokens, dtype=chosen, device=device)
    report = {"model": model, "tokens": tokens, "dtype": str(chosen), "device": device, "layers": rows}
    if as_json:
        print(json.dumps(report))
        return
    _show_plan(report)


def autotune(
    model: ModelName = "SmolLM2-135M",
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", "-T", help="May be repeated. Default: 1024."), AtLeast(1)
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="Scaled heads of a layer: all, a count, a fraction. May be repeated. Default: all."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="aten, triton; may be repeated. Default: what the device computes with.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, of which the median counts."), AtLeast(1)] = 9,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure the paths on this device, numbers checked first, and keep the answers for every later run on it.

    An answer holds for its dtype, N, K, head_dim, share of scaled heads and tokens from a power of four to the next,
    under the torch and Triton that made it. It never brings in a form that loses small scales which the default keeps.
    """
    from lofit_fast.models import op_paths
    from lofit_fast.models.device import as_device, as_dtype, best_device, best_dtype
    from lofit_kernels.answers import device_name, versions
    from lofit_kernels.dispatch import BACKENDS

    if backend and (unknown := set(backend) - set(BACKENDS)):
        raise ValueError(f"unknown backend {sorted(unknown)}: expected some of {BACKENDS}")
    where = best_device() if device == "auto" else as_device(device)
    chosen = best_dtype(where) if dtype == "auto" else as_dtype(dtype)
    tops = [parse_heads(text) for text in heads or ["all"]]
    with Console(quiet=as_json).status("measuring") as status:
        answers, file = op_paths.measure_paths(
            op_paths.layers_of(model),
            tops,
            tokens or [1024],
            chosen,
            where,
            backends=backend,
            rounds=rounds,
            tell=lambda answer: status.update(f"measured {answer.case}"),
        )
    rows = [{"case": a.case._asdict(), "path": str(a.chosen), **a.evidence()} for a in answers]
    report = {"device": device_name(where), "versions": versions(), "file": str(file), "answers": rows}
    if as_json:
        print(json.dumps(report))
        return
    _show_answers(report)


def _show_plan(report: dict) -> None:
    rows = report["layers"]
    title = f"{report['model']}, {report['tokens']} tokens, {report['dtype']}, {report['device']} device"
    table = Table("layers", "heads", "forward", "backward", "backend", "to the floor", title=title)
    reasons = dict.fromkeys((row["why"], row.get("small_scales")) for row in rows)
    for first, last in _runs(rows):
        row = rows[first]
        numbers = str(row["layer"]) if first == last else f"{row['layer']}-{rows[last]['layer']}"
        heads = f"{row['H']} x {row['D']}: {row['scaled']} scaled, {row['shifted']} shifted"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        table.add_row(numbers, heads, row["forward"], row["backward"], row.get("backend", "-"), ratio)
    out.print(table)
    for why, small_scales in reasons:
        out.print(f"{why}{f'; {small_scales}' if small_scales else ''}", highlight=False, markup=False)
    predicted = next(
        (row["evidence"] for row in rows if "evidence" in row), "no roofline for this device: no prediction"
    )
    out.print(f"floor: the frozen projection, forward and backward. Ratio: {predicted}", highlight=False)


def _runs(rows: list[dict]) -> list[tuple[int, int]]:
    """(first, last) of neighbouring rows that differ in their layer only."""
    runs: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        if runs and {**rows[runs[-1][0]], "layer": None} == {**row, "layer": None}:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _show_answers(report: dict) -> None:
    table = Table("case", "path", "ms", "to the default", "", title=f"measured on {report['device']}")
    for row in report["answers"]:
        case = ", ".join(f"{name} {value}" for name, value in row["case"].items())
        for path, milliseconds in row["milliseconds"].items():
            note = "chosen" if path == row["path"] else ""
            table.add_row(case, path, f"{milliseconds:.3g}", f"{row['ratio_to_default'][path]:.2f}", note)
            case = ""
        for path, reason in row["refused"].items():
            table.add_row(case, path, "-", "-", f"refused: {reason}")
    out.print(table)
    out.print(f"answers: {report['file']}", highlight=False, soft_wrap=True)
