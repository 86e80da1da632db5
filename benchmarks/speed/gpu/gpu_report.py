"""What the script leaves behind: gpu.json, a table on the terminal, and a picture where matplotlib is installed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MEASURED, REHEARSED = "GPU clock", "rehearsal, not a measurement"


def slug(device: str) -> str:
    """A device's name as a folder: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write(report: dict[str, Any], folder: Path) -> Path:
    """Writes gpu.json. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def heading(row: dict[str, Any]) -> str:
    """One timed row, in words."""
    return f"{row['level']} {row['model']} {row['setting']} T={row['T']} {row['dtype']}"


def text(row: dict[str, Any]) -> str:
    """One timed row as a table."""
    if "error" in row:
        return f"{heading(row)}: {row['error']}"
    lines = [heading(row)]
    for name, found in row["peers"].items():
        why = found.get("error") or found.get("skipped")
        if why:
            lines.append(f"  {name:24} {why.splitlines()[0][:100]}")
            continue
        times = found.get("vs_floor")
        ratio = f"{times['median']:6.3f} ({times['low']:.3f} to {times['high']:.3f}) x floor" if times else ""
        lines.append(f"  {name:24} {found['ms']:9.3f} ms  {ratio}  launched in {found['host_ms']:.3f} ms")
    return "\n".join(lines)


def picture(report: dict[str, Any], path: Path) -> str:
    """Draws every row's ratios to the floor. Returns what came of it, in words."""
    rows = [row for row in report["rows"] if "peers" in row]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        return f"no picture: {missing}"
    if not rows:
        return "no picture: nothing was timed"
    columns = min(4, len(rows))
    down = -(-len(rows) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(down, columns, squeeze=False).flat, rows, strict=False):
        found = {name: p["vs_floor"] for name, p in row["peers"].items() if "vs_floor" in p}
        medians = [times["median"] for times in found.values()]
        errors = [[t["median"] - t["low"] for t in found.values()], [t["high"] - t["median"] for t in found.values()]]
        axes.barh(list(found), medians, xerr=errors, color=["tab:gray" if n == "floor" else "tab:blue" for n in found])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        # the original loop is tens of times slower: it would flatten everything else
        axes.set_xlim(0, min(max(medians), 3) * 1.05 if medians else 1)
        axes.set_title(heading(row), fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in list(figure.axes)[len(rows) :]:
        axes.set_visible(False)
    figure.suptitle(f"forward + backward, times the frozen floor ({report['evidence']}, {report['machine']['device']})")
    figure.savefig(path, dpi=130)
    return f"picture: {path}"
